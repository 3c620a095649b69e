"""What every backbone is: a network that gives a feature map.

Legend: B images, C channels and H x W cells of the feature map.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fpcn_dist.models.norms import batch_norms, freeze, replace_norms
from fpcn_dist.runtime.errors import UserError


class Backbone(nn.Module):
    """Images [B, 3, H', W'] to the final feature map [B, C, H, W].

    Attributes:
        net: the network itself, under the names of its library, less what follows the feature map.
        channels: C.
        has_map: whether the features still have places, or are one vector [B, C, 1, 1].
        frozen: whether nothing of it learns. It is then a constant function: it stays in evaluation mode.
    """

    net: nn.Module

    def __init__(self, net: nn.Module, channels: int, norm: str, *, has_map: bool = True) -> None:
        super().__init__()
        self.net = replace_norms(net, norm)
        self.channels = channels
        self.has_map = has_map
        self.norm = norm
        self.frozen = False
        self.train()

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode and not self.frozen)
        if self.norm == "frozen_batch":
            for layer in batch_norms(self.net):
                layer.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Backbone:
        """Freeze or thaw the network, less the norms that ``model.norm`` keeps frozen whatever happens."""
        super().requires_grad_(requires_grad)
        self.frozen = not requires_grad
        self.train(self.training)
        if self.norm == "frozen_batch":
            freeze(self.net)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, C, H, W]."""
        self._check_device(images.device)
        return self.net(images)

    def _check_device(self, device: torch.device) -> None:
        if self.norm == "sync_batch" and self.training and device.type == "cpu" and dist.is_initialized():
            raise UserError(
                "model.norm",
                self.norm,
                "BatchNorm cannot be synchronised between ranks that train on the CPU",
                "use group or frozen_batch, train on GPUs, or start a single process",
            )
