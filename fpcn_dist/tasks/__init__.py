"""Tasks: what the one training loop trains."""

from __future__ import annotations

import torch

from fpcn_dist.config import Recipe
from fpcn_dist.models import FPCN, build_model
from fpcn_dist.tasks.base import Task, TaskOutput
from fpcn_dist.tasks.classify import Classify
from fpcn_dist.tasks.contrast import Contrast
from fpcn_dist.tasks.distill import Distill

__all__ = ["Classify", "Contrast", "Distill", "Task", "TaskOutput", "build_task"]


def build_task(recipe: Recipe, num_classes: int, group: torch.distributed.ProcessGroup | None = None) -> Task:
    """The recipe's task around a freshly initialised model; the same weights for the same seed on every rank."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, num_classes, task=recipe.task)
    if isinstance(model, FPCN):
        return Contrast(model, recipe.contrast, recipe.train, seed=recipe.seed, group=group)
    if recipe.task == "distill":
        return Distill(model, recipe.distill, recipe.train)
    return Classify(model, recipe.train)
