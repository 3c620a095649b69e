"""FPCN's training task: the contrast of pairs over the global batch, plus the centre loss (eq. 12)."""

from __future__ import annotations

import torch
from fpcn_kernels import pair_contrast
from torch import Tensor

from fpcn_dist.collectives import all_gather
from fpcn_dist.config import ContrastConfig, ModelConfig
from fpcn_dist.data.batch import Batch
from fpcn_dist.keys import key
from fpcn_dist.losses import ClassCenters, center_loss, gated_contrast_loss, hardest_pairs
from fpcn_dist.models import FPCN
from fpcn_dist.tasks.base import Task, TaskOutput


class Contrast(Task):
    """Class loss over pairs of the global batch + lambda x centre loss.

    Args:
        model: the network.
        head: recipe section of its head (activation, dropout, product or gated).
        config: which pairs, and the centre loss.
        seed: with the step, the key of dropout and random pairs.
        group: all ranks, or ``None`` for one.
        precision: see :class:`Task`.
    """

    couples_images = True

    def __init__(
        self,
        model: FPCN,
        head: ModelConfig,
        config: ContrastConfig,
        *,
        num_classes: int,
        seed: int,
        group: torch.distributed.ProcessGroup | None = None,
        precision: str = "fp32",
    ) -> None:
        super().__init__(model, precision)
        self.head, self.config, self.seed, self.group = head, config, seed, group
        self.centers = ClassCenters(num_classes, model.backbone.channels)

    def encode(self, batch: Batch) -> Tensor:
        return self.model.pool(batch.images).pooled

    def criterion(self, pooled: Tensor, batch: Batch, step: int) -> TaskOutput:
        class_loss = self._class_loss(pooled, batch.labels, seed=key(self.seed, step))
        parts = {"class_loss": class_loss.detach()}
        loss = class_loss
        if self.config.center_weight:
            self.centers.update(pooled, batch.labels, rate=self.config.center_rate, group=self.group)
            center = center_loss(
                pooled,
                batch.labels,
                self.centers.centers,
                reduction=self.config.center_reduction,
                group=self.group,
            )
            parts["center_loss"] = center.detach()
            loss = loss + self.config.center_weight * center
        with torch.no_grad():
            logits = self.model.logits(pooled)
        return TaskOutput(loss, logits, parts)

    def _class_loss(self, pooled: Tensor, labels: Tensor, seed: int) -> Tensor:
        layers = self.model.fuse_in, self.model.fuse_out, self.model.classifier
        weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        pairs: int | Tensor | None = self.config.num_pairs if self.config.pairs == "random" else None
        if self.config.pairs == "hardest":
            with torch.no_grad():
                everyone = all_gather(pooled, self.group), all_gather(labels, self.group)
            pairs = hardest_pairs(*everyone, self.config.num_pairs)
        if self.head.head == "gated":
            return gated_contrast_loss(
                pooled, labels, *weights, pairs=pairs, margin=self.config.margin,
                activation=self.head.activation, dropout=self.head.dropout, seed=seed, group=self.group,
            )  # fmt: skip
        return pair_contrast(
            pooled, labels, *weights, activation=self.head.activation, dropout=self.head.dropout,
            seed=seed, pairs=pairs, group=self.group,
        )  # fmt: skip
