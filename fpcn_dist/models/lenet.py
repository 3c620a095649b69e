"""LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", 1998), for colour photographs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fpcn_dist.models.base import Backbone
from fpcn_dist.runtime.errors import UserError

_SIDE = 32
"""Pixels of the image that it was made for."""


class LeNet(Backbone):
    """LeNet-5 less its last layer: images of any size, shrunk to 32 x 32, to features [B, 84, 1, 1].

    As in the paper but for what has become customary: three colours, every map of the second convolution sees every map
    of the first, averages without trainable coefficients, and a linear last layer. 62,006 parameters for ten classes.
    """

    def __init__(self, pretrained: bool | str, norm: str) -> None:
        if pretrained:
            raise UserError(
                "model.pretrained", pretrained, "there are no published weights for lenet", "set it to false"
            )
        net = nn.Sequential(
            nn.Conv2d(3, 6, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.Tanh(),
            nn.Linear(120, 84),
            nn.Tanh(),
        )
        super().__init__(net, 84, norm, has_map=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 84, 1, 1]."""
        small = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)
        return self.net(small)[:, :, None, None]
