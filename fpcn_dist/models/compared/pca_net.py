"""PCA-Net, the progressive co-attention network (Zhang et al., 2021).

Legend: B images, C = 512 feature channels, M = 32 attention maps, P = H x W cells, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fpcn_kernels import MaskedPool
from torch import Tensor, nn

from fpcn_dist.models.backbones import build_backbone
from fpcn_dist.models.base import Backbone
from fpcn_dist.models.classifier import Classifier, whole_image
from fpcn_dist.models.compared.bilinear_cnn import bilinear_pool
from fpcn_dist.recipe.schema import ModelConfig
from fpcn_dist.runtime.errors import UserError

FEATURES, ATTENTION = 512, 32
SCALE = 100.0
"""Length of a bilinear vector before the classifier."""


class PCANet(Classifier):
    """A ResNet cut short, bilinear pooling of its features with its attention maps, one linear layer.

    A single image is classified by its own maps; pairs and erased images are for training alone.

    Args:
        config: ``backbone`` is "resnet50" (as published) or "resnet101"; ``pretrained`` and ``norm`` as everywhere.
        num_classes: K.

    Raises:
        UserError: another backbone.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        if config.backbone not in ("resnet50", "resnet101"):
            reason = "PCA-Net reads its maps from inside a bottleneck block of torchvision's ResNets"
            raise UserError("model.backbone", config.backbone, reason, "use resnet50 or resnet101")
        backbone = _cut(
            build_backbone(config.backbone, pretrained=config.pretrained, norm=config.norm, drop_path=config.drop_path)
        )
        super().__init__(backbone, num_classes, features=FEATURES * ATTENTION)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H', W'] to features [B, 512, H, W] and attention maps [B, 32, H, W], at least float32."""
        both = self.backbone(images)
        both = both.to(torch.promote_types(both.dtype, torch.float32))
        return both[:, :FEATURES], both[:, FEATURES:]

    def pool(self, images: Tensor) -> MaskedPool:
        """Images [B, 3, H', W'] to their bilinear vectors [B, 512 x 32]; the mask is all ones."""
        features_BCHW, attention_BMHW = self.maps(images)
        with torch.autocast(images.device.type, enabled=False):
            pooled = attentive_pool(features_BCHW.flatten(2), attention_BMHW.flatten(2))
        return whole_image(pooled, features_BCHW)


class _Inside(nn.Module):
    """The first two convolutions of a bottleneck block: [B, C', H, W] to the features that the first gives and, after
    them, the first channels of the second as attention maps: [B, 512 + 32, H, W]."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn1(self.conv1(x)))
        attention = F.relu(self.bn2(self.conv2(features)))
        return torch.cat([features, attention[:, :ATTENTION]], dim=1)


def _cut(backbone: Backbone) -> Backbone:
    """A ResNet whose last stage ends inside its second block."""
    net: Any = backbone.net
    first, second, *_ = net.layer4
    net.layer4 = nn.Sequential(first, _Inside(second))
    backbone.channels = FEATURES + ATTENTION
    return backbone


def attentive_pool(features_BCP: Tensor, attention_BMP: Tensor) -> Tensor:
    """Bilinear vectors [B, C M] of length 100."""
    return SCALE * bilinear_pool(features_BCP, attention_BMP)


def co_attention(own_BMP: Tensor, other_BMP: Tensor) -> Tensor:
    """Attention maps [B, M, P] of images that have looked at others of their class.

    softmax(-A_own A_other^T) A_own + A_own, the softmax over the maps of the other image.
    """
    unlike_BMM = torch.softmax(-torch.bmm(own_BMP, other_BMP.transpose(1, 2)), dim=2)
    return torch.bmm(unlike_BMM, own_BMP) + own_BMP


@torch.no_grad()
def erase(images: Tensor, attention_BMHW: Tensor, uniform_B2: Tensor) -> Tensor:
    """Images [B, 3, H', W'] without what one of their attention maps looks at.

    The map is drawn in proportion to the square root of its mean; where it exceeds a share of its maximum, drawn from
    [0.2, 0.5), the pixels become 0 (the mean colour).

    Args:
        images: normalised.
        attention_BMHW: [B, M, H, W], not negative.
        uniform_B2: [B, 2] in [0, 1): draws of the map and of the share.
    """
    attention = F.interpolate(attention_BMHW, images.shape[2:], mode="bilinear", align_corners=False)
    weight_BM = attention.mean((2, 3)).sqrt() + 1e-12
    cumulated_BM = weight_BM.cumsum(1)
    drawn_B1 = uniform_B2[:, :1] * cumulated_BM[:, -1:]
    index_B = (cumulated_BM <= drawn_B1).sum(1).clamp(max=attention.shape[1] - 1)
    chosen_BHW = attention[torch.arange(len(images), device=images.device), index_B]
    threshold_B = (0.2 + 0.3 * uniform_B2[:, 1]) * chosen_BHW.amax((1, 2))
    return images * (chosen_BHW < threshold_B[:, None, None])[:, None]
