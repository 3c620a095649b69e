"""The plain classifier, the baseline of FPCN and the base of every network here.

Legend: B images, C channels of the feature map, K classes."""

from __future__ import annotations

import torch
from fpcn_kernels import MaskedPool
from torch import Tensor, nn

from fpcn_dist.models.backbones import build_backbone
from fpcn_dist.models.base import Backbone


class Classifier(nn.Module):
    """Backbone, global average pooling, one linear layer.

    Args:
        backbone: the network, or its name for :func:`build_backbone`, as for ``pretrained``, ``norm`` and
            ``drop_path``.
        num_classes: K.
        features: width of the pooled vectors; ``None``: the backbone's channels.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: str | Backbone,
        num_classes: int,
        *,
        pretrained: bool | str = False,
        norm: str = "batch",
        drop_path: float | None = None,
        features: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            backbone = build_backbone(backbone, pretrained=pretrained, norm=norm, drop_path=drop_path)
        self.backbone = backbone
        self.classifier = nn.Linear(features or backbone.channels, num_classes)

    @property
    def region(self) -> str:
        """What of the feature map is pooled, in words that tell it from every other way."""
        return "none"

    def pool(self, images: Tensor) -> MaskedPool:
        """Images [B, 3, H', W'] to their pooled features; the two halves of it one after the other."""
        return self.pool_maps(*self.feature_maps(images))

    def feature_maps(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H', W'] to the map [B, C, H, W] of the backbone, and that of an earlier block where
        :meth:`pool_maps` needs one."""
        return self.backbone(images), None

    def pool_maps(self, features_BCHW: Tensor, companion: Tensor | None = None) -> MaskedPool:
        """The mean of the features over the whole map; the mask is all ones."""
        pooled_BC = features_BCHW.mean((2, 3), dtype=torch.promote_types(features_BCHW.dtype, torch.float32))
        return whole_image(pooled_BC, features_BCHW)

    def logits(self, pooled: Tensor) -> Tensor:
        """Pooled vectors [B, C] to logits [B, K], image by image."""
        return self.classifier(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H', W'] to logits [B, K]."""
        return self.logits(self.pool(images).pooled)


def whole_image(pooled: Tensor, features_BCHW: Tensor) -> MaskedPool:
    """Pooled vectors [B, C] of a network that takes no part of the image for the object."""
    mask_BHW = pooled.new_ones(len(pooled), *features_BCHW.shape[2:])
    return MaskedPool(pooled, mask_BHW, mask_BHW[:, 0, 0])


def object_share(mask_BHW: Tensor) -> Tensor:
    """[B] share of cells inside the region. Outside, the mask holds theta < 1, so alpha (eq. 4) is not this share."""
    return (mask_BHW == 1).float().mean(dim=(1, 2))
