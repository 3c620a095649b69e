"""Bilinear CNN (Lin et al., 2015), with one network for both of its streams.

Legend: B images, C channels, P = H x W cells, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fpcn_kernels import MaskedPool
from torch import Tensor, nn

from fpcn_dist.models import weights
from fpcn_dist.models.backbones import build_backbone, no_drop_path
from fpcn_dist.models.base import Backbone
from fpcn_dist.models.classifier import Classifier, whole_image
from fpcn_dist.recipe.schema import ModelConfig
from fpcn_dist.runtime.errors import UserError

_OFFSET = 1e-5
"""Under the square root, whose slope at 0 is infinite."""


class BilinearCNN(Classifier):
    """Backbone, bilinear pooling of its map with itself, one linear layer on the C x C products.

    Args:
        config: ``backbone`` "vgg16" is torchvision's without its last pooling, as published: 28 x 28 cells of 512
            channels at 448 px; any other with a feature map will do. ``pretrained`` and ``norm`` as everywhere.
        num_classes: K.

    Raises:
        UserError: see :func:`build_backbone`; or a network without a feature map.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        if config.backbone == "vgg16":
            if config.drop_path is not None:
                raise no_drop_path("vgg16", config.drop_path)
            backbone: Backbone = VGG16(config.pretrained, config.norm)
        else:
            backbone = build_backbone(
                config.backbone, pretrained=config.pretrained, norm=config.norm, drop_path=config.drop_path
            )
        if not backbone.has_map:
            reason = "it gives no feature map whose channels could be multiplied"
            raise UserError("model.backbone", config.backbone, reason, "use vgg16, or another network with a map")
        super().__init__(backbone, num_classes, features=backbone.channels**2)

    @property
    def region(self) -> str:
        return "bilinear"

    def pool_maps(self, features_BCHW: Tensor, companion: Tensor | None = None) -> MaskedPool:
        """Features [B, C, H, W] to their bilinear vectors [B, C^2]; the mask is all ones."""
        with torch.autocast(features_BCHW.device.type, enabled=False):
            features_BCP = features_BCHW.flatten(2)
            features_BCP = features_BCP.to(torch.promote_types(features_BCP.dtype, torch.float32))
            return whole_image(bilinear_pool(features_BCP, features_BCP), features_BCHW)


class VGG16(Backbone):
    """torchvision's VGG16 without its last pooling and what follows: features [B, 512, H'/16, W'/16]."""

    def __init__(self, pretrained: bool | str, norm: str) -> None:
        import torchvision  # here, for the reason that stands in fpcn_dist/models/backbones.py

        net: torchvision.models.VGG = torchvision.models.vgg16(weights=None, init_weights=pretrained is False)
        if isinstance(pretrained, str):
            weights.load_file(net, pretrained, ignored=["classifier"])
        elif pretrained:
            net.load_state_dict(weights.torchvision_weights("vgg16"))
        super().__init__(nn.Sequential(*list(net.features.children())[:-1]), 512, norm)


def bilinear_pool(first_BCP: Tensor, second_BMP: Tensor) -> Tensor:
    """Two maps of the same cells to one vector [B, C M] of length 1.

        X = first second^T / P,    X <- sign(X) sqrt(|X| + 1e-5),    X <- X / |X|

    Lin et al., "Bilinear CNN models for fine-grained visual recognition", section 3.
    """
    product_BD = torch.bmm(first_BCP, second_BMP.transpose(1, 2)).flatten(1) / first_BCP.shape[2]
    return F.normalize(product_BD.sign() * (product_BD.abs() + _OFFSET).sqrt())
