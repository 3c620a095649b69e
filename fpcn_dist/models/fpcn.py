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

    def pool(self, images: Tensor) -> MaskedPool:
        """Images [B, 3, H', W'] to their features, pooled inside the region (eq. 1 to 5 and 7).

        Returns:
            pooled [B, C], mask [B, H, W] and area [B], at least float32 whatever autocast does to the backbone.
        """
        if self.config.region == "none":
            return super().pool(images)
        if self.config.companion and isinstance(self.backbone, ResNet):
            features, companion = self.backbone.forward_with_companion(images)
        else:
            features, companion = self.backbone(images), None
        with torch.autocast(images.device.type, enabled=False):
            result = masked_pool(features, theta=self.config.theta, region=self.config.region, companion=companion)
        if self.config.area_scale:
            return result
        return result._replace(pooled=result.pooled / result.area[:, None])

    def logits(self, pooled: Tensor) -> Tensor:
        """Pooled vectors [B, C] to logits [B, K], image by image and without dropout, as ``inference`` says.

        ``"self_pair"``: of X * X_f, or of X + sigmoid(X_f * X) * X with the gated head, where X_f = MLP(concat(X, X));
        ``"plain"``: of X.
        """
        if self.config.inference == "plain":
            return self.classifier(pooled)
        hidden = self.fuse_in(torch.cat([pooled, pooled], dim=1))
        if self.config.activation == "relu":
            hidden = hidden.relu()
        fused = self.fuse_out(hidden)
        gate = fused if self.config.head == "product" else 1 + torch.sigmoid(fused * pooled)
        return self.classifier(gate * pooled)
