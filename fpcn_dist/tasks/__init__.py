"""Tasks: what the one training loop trains."""

from __future__ import annotations

import torch

from fpcn_dist.models import build_model
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.collectives import Group
from fpcn_dist.tasks.base import Setting, Task, TaskOutput
from fpcn_dist.tasks.classify import Classify
from fpcn_dist.tasks.contrast import Contrast
from fpcn_dist.tasks.distill import Distill
from fpcn_dist.tasks.mmal_net import MMALNetTask
from fpcn_dist.tasks.pca_net import PCANetTask

__all__ = [
    "TASKS",
    "Classify",
    "Contrast",
    "Distill",
    "MMALNetTask",
    "PCANetTask",
    "Setting",
    "Task",
    "TaskOutput",
    "build_task",
]

TASKS: dict[str, type[Task]] = {
    "contrast": Contrast,
    "classify": Classify,
    "distill": Distill,
    "bilinear_cnn": Classify,
    "pca_net": PCANetTask,
    "mmal_net": MMALNetTask,
}
"""The losses of each task of :data:`fpcn_dist.recipe.schema.Task`."""


def build_task(
    recipe: Recipe,
    num_classes: int,
    group: Group | None = None,
    *,
    steps_per_epoch: int = 0,
    class_counts: tuple[int, ...] = (),
    images: int = 0,
) -> Task:
    """The recipe's task around a freshly initialised model; the same weights for the same seed on every rank.

    Args:
        recipe: what to compute.
        num_classes: of the data.
        group: all ranks, or ``None`` for one.
        steps_per_epoch: for tasks that begin otherwise than they go on; 0 skips such a beginning.
        class_counts: training images of each class, for ``data.class_weights``; by default as many of each.
        images: of the whole data set, for ``data.augment.region``.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, num_classes, task=recipe.task)
    return TASKS[recipe.task](
        model, recipe, Setting(group, steps_per_epoch, class_counts or (1,) * num_classes, images)
    )
