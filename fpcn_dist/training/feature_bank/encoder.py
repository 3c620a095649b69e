"""What computes the rows of a feature bank: a frozen network, in any number of regions at one pass of its backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fpcn_dist.models import FPCN, Backbone, Classifier
from fpcn_dist.models.classifier import object_share
from fpcn_dist.models.fpcn import region_name
from fpcn_dist.models.modes import autocast, evaluating
from fpcn_dist.recipe.schema import ModelConfig

FeatureMaps = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Images to feature maps, as :meth:`fpcn_dist.models.Classifier.feature_maps` does."""


class Encoder:
    """Images to the features that the training step would compute of them, with the same roundings.

    Args:
        model: the network.
        regions: the regions to pool in, of an FPCN; ``None``: the network's own way of pooling.
        precision: ``train.precision``.
        channels_last: ``train.channels_last``.
        maps: what computes the feature maps; ``None``: the backbone as it stands in ``model``.

    Attributes:
        regions: their names, in the order of a row.
        channels: C, the width of a pooled vector.
    """

    def __init__(
        self,
        model: Classifier,
        regions: Sequence[ModelConfig] | None,
        *,
        precision: str,
        channels_last: bool = False,
        maps: FeatureMaps | None = None,
    ) -> None:
        self.model, self._maps = model, maps or model.feature_maps
        self._configs = regions
        self.regions = [model.region] if regions is None else [region_name(config) for config in regions]
        self.channels = model.classifier.in_features
        self._precision, self._order = precision, torch.channels_last if channels_last else torch.preserve_format

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H', W'] to rows [B, R (C + 1)] float32: for each region its pooled vector, then the share of
        the map inside it."""
        images = images.contiguous(memory_format=self._order)
        with evaluating(self.model), autocast(images.device, self._precision):
            features, companion = self._maps(images)
            if self._configs is None:
                pools = [self.model.pool_maps(features, companion)]
            else:
                assert isinstance(self.model, FPCN)
                pools = [self.model.pool_maps(features, companion, region=config) for config in self._configs]
        parts = [part.float() for pool in pools for part in (pool.pooled, object_share(pool.mask)[:, None])]
        return torch.cat(parts, dim=1)


def weights_hash(backbone: Backbone) -> str:
    """SHA-256 over the names, shapes and contents of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
