"""What a decoding backend is asked for, and the one batch type that the loaders yield and every task reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.views import Views

BATCHES_IN_FLIGHT = 2
"""Batches that a backend works on: the one that is waited for, and the next."""


class BatchRequest(NamedTuple):
    """What a backend needs to make the images of one batch.

    Attributes:
        blobs: B encoded images.
        views: [B] of :data:`fpcn_dist.data.views.VIEW`.
    """

    blobs: list[Blob]
    views: Views


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, on the training device.

    Attributes:
        images: [B, 3, H, W] float32, normalised; [B, 3, 0, 0] where they are known by their features.
        labels: [B] int64 class indices.
        image_ids: [B] int64 indices into the manifest; they name an image in every split and on every rank.
        view_ids: [B] int64; how often the image had been drawn before, so (image id, view id) names a view.
        crops: [B, 5] float64: where each view was cut, as :func:`fpcn_dist.data.views.crops` says; 0 without
            images.
        teacher_logits: [B, K] float32, a teacher's logits of these views, where there is one.
        targets: [B, K] float32, the share of each class, where images are mixed; ``labels`` are then those of the
            images that others were mixed into.
        pooled: [B, C] float32, the features of these views, where they were computed before.
    """

    images: Tensor
    labels: Tensor
    image_ids: Tensor
    view_ids: Tensor
    crops: Tensor
    teacher_logits: Tensor | None = None
    targets: Tensor | None = None
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def split(self, parts: int) -> list[Batch]:
        """Cut into ``parts`` consecutive batches, as even as possible, for gradient accumulation."""
        columns = [getattr(self, name) for name in self.__dataclass_fields__]
        split = [[None] * parts if column is None else torch.tensor_split(column, parts) for column in columns]
        return [Batch(*row) for row in zip(*split, strict=True)]
