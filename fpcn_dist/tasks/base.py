"""What every task is: a module that turns a batch into a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fpcn_dist.data.batch import Batch
from fpcn_dist.models import Classifier
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.collectives import Group
from fpcn_dist.tasks.losses import class_weights, classification_loss


class TaskOutput(NamedTuple):
    """Result of one step on this rank; a tuple, because DeepSpeed hooks onto the tensors of tuples alone.

    Attributes:
        loss: scalar; its mean over ranks is the loss of the global batch.
        logits: [B, K] float32, detached, for the training accuracy.
        parts: detached scalars that the loss is made of; their means over ranks are those of the global batch.
    """

    loss: Tensor
    logits: Tensor
    parts: dict[str, Tensor]


class Setting(NamedTuple):
    """What a task must know of the run beside its recipe.

    Attributes:
        group: all ranks, or ``None`` for one.
        steps_per_epoch: for tasks that begin otherwise than they go on; 0 skips such a beginning.
        class_counts: training images of each class, for ``data.class_weights``.
        images: of the whole data set, whose last regions ``data.augment.region`` asks for.
    """

    group: Group | None = None
    steps_per_epoch: int = 0
    class_counts: tuple[int, ...] = ()
    images: int = 0


class Task(nn.Module, ABC):
    """A model with its losses. The engine wraps the whole task, so that a loss may hold parameters and buffers.

    A step has two halves: :meth:`encode` works image by image, :meth:`criterion` may couple images. Gradient
    accumulation cuts the first half into parts and leaves the second whole, so it never changes the loss.

    Args:
        model: the network that is trained.
        recipe: what to compute. ``train.precision`` "bf16" runs ``encode`` under bfloat16 autocast (the criterion
            always computes in float32); ``train.channels_last`` gives ``encode`` images in that memory order.
        setting: the ranks and the length of an epoch.
    """

    couples_images = False
    """Whether the criterion of a batch is more than the mean over its images."""

    encodes_views = True
    """Whether what a frozen backbone gives :meth:`encode` depends on the view alone, not on the step or the batch, and
    nothing else that learns takes part in it; it can then be computed once."""

    model: Classifier
    class_weights: Tensor | None

    def __init__(self, model: Classifier, recipe: Recipe, setting: Setting) -> None:
        super().__init__()
        self.model, self.recipe, self.setting = model, recipe, setting
        kind = recipe.data.class_weights
        weights = None if kind == "none" else class_weights(kind, setting.class_counts)
        self.register_buffer("class_weights", weights, persistent=False)  # the data tell them again

    @abstractmethod
    def encode(self, batch: Batch, step: int) -> Tensor:
        """Features [B, C] float32 of the images of ``batch``; the same whenever it is called for the same step."""

    @abstractmethod
    def criterion(self, pooled: Tensor, batch: Batch, step: int) -> TaskOutput:
        """Loss of features [B, C]; ``step`` seeds what is drawn at random."""

    def class_loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        """The cross-entropy of ``logits`` [B, K], by the shares of classes where images are mixed, weighted by class
        and smoothed where the recipe says so."""
        smoothing = self.recipe.loss.label_smoothing
        return classification_loss(
            logits, labels, targets=targets, weights=self.class_weights, label_smoothing=smoothing
        )

    def forward(self, batch: Batch, step: int, *, pooled: Tensor | None = None, encode_only: bool = False):
        """Both halves in one call; or one of them: the engine must see every use of the parameters as a forward."""
        pooled = batch.pooled if pooled is None else pooled
        if pooled is None:
            if self.recipe.train.channels_last:
                batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
            precision = self.recipe.train.precision
            with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                pooled = self.encode(batch, step)
            pooled = pooled.float() if pooled.dtype in (torch.bfloat16, torch.float16) else pooled
        return pooled if encode_only else self.criterion(pooled, batch, step)
