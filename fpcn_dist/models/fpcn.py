"""FPCN, and the plain classifier that is its baseline.

Legend: B images, C channels of the feature map, D hidden units (``hidden``), K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from fpcn_kernels import MaskedPool, masked_pool
from torch import Tensor, nn

from fpcn_dist.models.backbones import ResNet
from fpcn_dist.models.classifier import Classifier
from fpcn_dist.recipe.schema import ModelConfig
from fpcn_dist.runtime.errors import UserError


class FPCN(Classifier):
    """Feature-positioning contrast network (eq. 1 to 9).

    The layers of the MLP of eq. 6 are ``fuse_in`` [2C -> D] and ``fuse_out`` [D -> C]. Training classifies *pairs* of
    pooled vectors, see ``fpcn_kernels.pair_contrast``; a single image is classified as the pair of it with itself.

    Args:
        backbone: see :func:`build_backbone`.
        num_classes: K.
        **options: the other fields of :class:`~fpcn_dist.recipe.schema.ModelConfig`, where they are described, with its
            defaults, except that ``pretrained`` is ``False`` here.

    Raises:
        UserError: see :func:`build_backbone`; a region of a network without a feature map; or ``companion`` with a
            network that is not one of torchvision's ResNets.
        pydantic.ValidationError: an option that does not exist, or has no such value.
    """

    def __init__(self, backbone: str = "resnet101", num_classes: int = 200, **options: Any) -> None:
        config = ModelConfig(backbone=backbone, **{"pretrained": False, **options})
        own = config.model_dump(include={"pretrained", "norm", "drop_path"})
        super().__init__(backbone, num_classes, **own)
        if config.companion and not isinstance(self.backbone, ResNet):
            raise UserError(
                "model.companion",
                True,
                f"it is not known which block of {backbone} comes before the last",
                "set model.companion to false, or use resnet18, resnet34, resnet50 or resnet101",
            )
        if config.region != "none" and not self.backbone.has_map:
            raise UserError(
                "model.backbone",
                backbone,
                "it gives no feature map in which a region could be found",
                "use a network that keeps the image's layout (docs/backbones.md), or set model.region to 'none'",
            )
        self.config = config
        channels = self.backbone.channels
        self.fuse_in = nn.Linear(2 * channels, config.hidden)
        self.fuse_out = nn.Linear(config.hidden, channels)
        if config.fuse_init == "ones":
            # X_f = 1 up to noise: eq. 8 and 9 then change nothing, and training starts as a plain classifier.
            nn.init.normal_(self.fuse_out.weight, std=1e-3)
            nn.init.ones_(self.fuse_out.bias)

    @property
    def region(self) -> str:
        return region_name(self.config)

    def feature_maps(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.companion and isinstance(self.backbone, ResNet):
            return self.backbone.forward_with_companion(images)
        return super().feature_maps(images)

    def pool_maps(
        self, features_BCHW: Tensor, companion: Tensor | None = None, *, region: ModelConfig | None = None
    ) -> MaskedPool:
        """The features [B, C, H, W] pooled inside the region (eq. 1 to 5 and 7).

        Args:
            features_BCHW, companion: of :meth:`feature_maps`.
            region: whose region, theta and alpha to take; ``None``: the network's own.

        Returns:
            pooled [B, C], mask [B, H, W] and area [B], at least float32 whatever autocast does to the backbone.
        """
        config = region or self.config
        if config.region == "none":
            return super().pool_maps(features_BCHW)
        before = companion if config.companion else None
        with torch.autocast(features_BCHW.device.type, enabled=False):
            result = masked_pool(features_BCHW, theta=config.theta, region=config.region, companion=before)
        if config.area_scale:
            return result
        return result._replace(pooled=result.pooled / result.area[:, None])

    def fuse(self, pooled: Tensor, others: Tensor) -> Tensor:
        """X_f [B, C] of eq. 6: the MLP of pooled vectors [B, C], each beside that of its partner, without dropout."""
        hidden = self.fuse_in(torch.cat([pooled, others], dim=1))
        if self.config.activation == "relu":
            hidden = hidden.relu()
        return self.fuse_out(hidden)

    def logits(self, pooled: Tensor) -> Tensor:
        """Pooled vectors [B, C] to logits [B, K], image by image and without dropout, as ``inference`` says.

        ``"self_pair"``: of X * X_f, or of X + sigmoid(X_f * X) * X with the gated head, where X_f = MLP(concat(X, X));
        ``"plain"``: of X.
        """
        if self.config.inference == "plain":
            return self.classifier(pooled)
        fused = self.fuse(pooled, pooled)
        gate = fused if self.config.head == "product" else 1 + torch.sigmoid(fused * pooled)
        return self.classifier(gate * pooled)


def region_name(config: ModelConfig) -> str:
    """The fields that decide what FPCN pools, in words: the same words for the same pooling."""
    if config.region == "none":
        return "none"
    companion, scale = " with companion" if config.companion else "", "" if config.area_scale else ", not times alpha"
    return f"{config.region}{companion}, theta {config.theta:g}{scale}"
