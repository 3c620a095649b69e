"""Tasks: what the one training loop trains."""

from __future__ import annotations

import torch

from fpcn_dist.models import FPCN, MMALNet, PCANet, build_model
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.tasks.base import Task, TaskOutput
from fpcn_dist.tasks.classify import Classify
from fpcn_dist.tasks.contrast import Contrast
from fpcn_dist.tasks.distill import Distill
from fpcn_dist.tasks.mmal_net import MMALNetTask
from fpcn_dist.tasks.pca_net import PCANetTask

__all__ = ["Classify", "Contrast", "Distill", "MMALNetTask", "PCANetTask", "Task", "TaskOutput", "build_task"]


def build_task(
    recipe: Recipe,
    num_classes: int,
    group: torch.distributed.ProcessGroup | None = None,
    *,
    steps_per_epoch: int = 0,
) -> Task:
    """The recipe's task around a freshly initialised model; the same weights for the same seed on every rank.

    Args:
        recipe: what to compute.
        num_classes: of the data.
        group: all ranks, or ``None`` for one.
        steps_per_epoch: for tasks that begin otherwise than they go on; 0 skips such a beginning.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, num_classes, task=recipe.task)
    coupling = {"seed": recipe.seed, "group": group}
    if isinstance(model, FPCN):
        return Contrast(model, recipe.contrast, recipe.train, **coupling)
    if isinstance(model, PCANet):
        return PCANetTask(model, recipe.contrast, recipe.train, **coupling)
    if isinstance(model, MMALNet):
        return MMALNetTask(model, recipe.train, raw_steps=steps_per_epoch)
    if recipe.task == "distill":
        return Distill(model, recipe.distill, recipe.train)
    return Classify(model, recipe.train)
