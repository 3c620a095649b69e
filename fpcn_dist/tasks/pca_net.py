"""PCA-Net's training: the image, the image without what it looked at, and co-attention with images of its class.

Legend: B images of this rank, N of the global batch, M attention maps, P cells, k partners of an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.models.compared.pca_net import ATTENTION, FEATURES, SCALE, PCANet, attentive_pool, co_attention, erase
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.collectives import all_gather, all_gather_unlike
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.keys import key
from fpcn_dist.tasks.base import Setting, Task, TaskOutput
from fpcn_dist.tasks.losses import ClassCenters, random_partners

_DRAWS = 4096
"""Draws of a step, dealt out by image id: two images that share one are none the worse for it."""


class PCANetTask(Task):
    """The loss is (CE(image) + CE(erased image) + CE(co-attention)) / 3 + weight x centre loss.

    Every image of a pair is the first of one and may be the second of others, so these three are the published six
    cross-entropies of both images of a pair.

    Args:
        model: the network.
        recipe: ``contrast.num_pairs`` = k N gives each image k partners of its class, drawn at random;
            ``contrast.center_weight`` and ``contrast.center_rate`` describe the centre loss (published: 1 and 0.05);
            ``seed`` is with the step the key of partners and erasing.
        setting: see :class:`Task`.
    """

    couples_images = True
    encodes_views = False
    model: PCANet

    def __init__(self, model: PCANet, recipe: Recipe, setting: Setting) -> None:
        super().__init__(model, recipe, setting)
        self.config, self.group = recipe.contrast, setting.group
        self.centers = ClassCenters(model.classifier.out_features, FEATURES * ATTENTION)

    def encode(self, batch: Batch, step: int) -> Tensor:
        """The maps of the images, then the bilinear vectors of the erased images: [B, (512 + M) P + 512 M]."""
        features, attention = self.model.maps(batch.images)
        draws = self._generator(batch.images.device, step, purpose=0)
        uniform = torch.rand(_DRAWS, 2, generator=draws, device=batch.images.device)
        erased = erase(batch.images, attention.detach(), uniform[batch.image_ids % _DRAWS])
        return torch.cat([features.flatten(1), attention.flatten(1), self.model.pool(erased).pooled], dim=1)

    def criterion(self, pooled: Tensor, batch: Batch, step: int) -> TaskOutput:
        vector = FEATURES * ATTENTION
        maps, erased = pooled[:, :-vector], pooled[:, -vector:]
        both = maps.unflatten(1, (FEATURES + ATTENTION, -1))
        features, attention = both[:, :FEATURES], both[:, FEATURES:]
        raw = attentive_pool(features, attention)
        logits = self.model.logits(raw)
        losses = [
            self.class_loss(logits, batch.labels),
            self.class_loss(self.model.logits(erased), batch.labels),
            self._co_attention_loss(features, attention, batch.labels, step),
        ]
        loss = torch.stack(losses).mean()
        parts = {"class_loss": loss.detach()}
        if self.config.center_weight:
            unit = raw / SCALE
            self.centers.update(unit, batch.labels, rate=self.config.center_rate, group=self.group)
            centers = F.normalize(self.centers.centers)[batch.labels]
            center = (unit - centers).square().sum(1).mean()
            parts["center_loss"] = center.detach()
            loss = loss + self.config.center_weight * center
        return TaskOutput(loss, logits.detach(), parts)

    def _co_attention_loss(self, features: Tensor, attention: Tensor, labels: Tensor, step: int) -> Tensor:
        """The mean cross-entropy of the images of this rank, each after a look at its partners in the global batch."""
        everyone = all_gather_unlike(attention.flatten(1), self.group).unflatten(1, (ATTENTION, -1))
        all_labels, count = all_gather(labels, self.group), len(labels)
        generator = self._generator(labels.device, step, purpose=1)
        partners_Nk = random_partners(all_labels, self._partners(len(all_labels)), generator)
        rank = 0 if self.group is None else torch.distributed.get_rank(self.group)
        partners_Bk = partners_Nk[rank * count : (rank + 1) * count]
        looked = []
        for partner_B in partners_Bk.unbind(1):
            fused = co_attention(attention, everyone[partner_B])
            looked.append(self.class_loss(self.model.logits(attentive_pool(features, fused)), labels))
        return torch.stack(looked).mean()

    def _partners(self, images: int) -> int:
        """How many partners k each image of the global batch has."""
        pairs = self.config.num_pairs or images
        if pairs % images or pairs >= images * images:
            near = max(1, min(pairs // images, images - 1)) * images
            reason = f"the {images} images of a batch each have the same number of partners"
            raise UserError("contrast.num_pairs", pairs, reason, f"use a multiple of {images}, such as {near}")
        return pairs // images

    def _generator(self, device: torch.device, step: int, *, purpose: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(key(self.recipe.seed, step, purpose))
