"""FPCN's training task: the contrast of pairs over the global batch, plus the centre loss (eq. 12)."""

from __future__ import annotations

import torch
from fpcn_kernels import PairHead, pair_contrast
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.models import FPCN
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.collectives import all_gather, world_size
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.keys import key
from fpcn_dist.tasks.base import Setting, Task, TaskOutput
from fpcn_dist.tasks.last_regions import LastRegions
from fpcn_dist.tasks.losses import ClassCenters, center_loss, gated_contrast_loss, hardest_pairs


class Contrast(Task):
    """The loss is the class loss over pairs of the global batch + lambda x centre loss.

    Args:
        model: the network.
        recipe: ``contrast`` says which pairs, and describes the centre loss; ``seed`` is with the step the key of
            dropout and random pairs.
        setting: see :class:`Task`.
    """

    couples_images = True
    model: FPCN

    def __init__(self, model: FPCN, recipe: Recipe, setting: Setting) -> None:
        super().__init__(model, recipe, setting)
        self.config, self.group = recipe.contrast, setting.group
        self.centers = ClassCenters(model.classifier.out_features, model.backbone.channels)
        self.regions: LastRegions | None = None
        if recipe.data.augment.region != "none":
            self.regions = LastRegions(setting.images, recipe.data, setting.group)

    def encode(self, batch: Batch, step: int) -> Tensor:
        if self.regions is None or not self.training:
            return self.model.pool(batch.images).pooled
        pool = self.model.pool(self.regions.shown(batch))
        self.regions.note(batch, pool.mask)
        return pool.pooled

    def criterion(self, pooled: Tensor, batch: Batch, step: int) -> TaskOutput:
        loss = self._class_loss(pooled, batch.labels, key(self.recipe.seed, step))
        parts = {"class_loss": loss.detach()}
        if self.config.center_weight:
            self.centers.update(pooled, batch.labels, rate=self.config.center_rate, group=self.group)
            centers, reduction = self.centers.centers, self.config.center_reduction
            center = center_loss(pooled, batch.labels, centers, reduction=reduction, group=self.group)
            parts["center_loss"] = center.detach()
            loss = loss + self.config.center_weight * center
        with torch.no_grad():
            logits = self.model.logits(pooled)
        return TaskOutput(loss, logits, parts)

    def _class_loss(self, pooled: Tensor, labels: Tensor, seed: int) -> Tensor:
        model, config = self.model, self.model.config
        head = PairHead.of(model.fuse_in, model.fuse_out, model.classifier)
        options = {"activation": config.activation, "dropout": config.dropout, "seed": seed, "group": self.group}
        hardest = self.config.pairs == "hardest"
        pairs = self._hardest_pairs(pooled, labels) if hardest else self.config.num_pairs
        if config.head == "gated":
            assert isinstance(pairs, Tensor), "the recipe says so"
            return gated_contrast_loss(pooled, labels, head, pairs=pairs, margin=self.config.margin, **options)
        if self.config.pairs == "shifts":
            return pair_contrast(pooled, labels, head, shifts=self._shifts(len(pooled)), **options)
        return pair_contrast(pooled, labels, head, pairs=pairs, **options)

    def _shifts(self, images: int) -> int:
        """How many shifts make the pairs of the recipe out of a batch of which this rank holds so many images."""
        total, pairs = images * world_size(self.group), self.config.num_pairs
        assert pairs is not None, "the recipe says so"
        if pairs % total or pairs > total**2:
            near = min(max(round(pairs / total), 1), total) * total
            reason = f"each shift pairs all {total} images of a batch"
            raise UserError("contrast.num_pairs", pairs, reason, f"use a multiple of {total}, such as {near}")
        return pairs // total

    @torch.no_grad()
    def _hardest_pairs(self, pooled: Tensor, labels: Tensor) -> Tensor:
        return hardest_pairs(all_gather(pooled, self.group), all_gather(labels, self.group), self.config.num_pairs)
