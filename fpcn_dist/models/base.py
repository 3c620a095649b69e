"""What every backbone is: a network that gives a feature map.

Legend: B images, C channels and H x W cells of the feature map.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fpcn_dist.models.depth import layer_depths
from fpcn_dist.models.norms import batch_norms, freeze, replace_norms
from fpcn_dist.recipe.training import Depth
from fpcn_dist.runtime.errors import UserError


class Backbone(nn.Module):
    """Images [B, 3, H', W'] to the final feature map [B, C, H, W].

    Attributes:
        net: the network itself, under the names of its library, less what follows the feature map.
        channels: C.
        has_map: whether the features still have places, or are one vector [B, C, 1, 1].
        ends_in_tokens: whether the map is made of a transformer's patch tokens.
        published_side: side in pixels of the images that it was published for.
        frozen: how deep the network is frozen; see :meth:`freeze`.
    """

    net: nn.Module
    ends_in_tokens = False
    published_side = 224

    def __init__(self, net: nn.Module, channels: int, norm: str, *, has_map: bool = True) -> None:
        super().__init__()
        self.net = replace_norms(net, norm)
        self.channels = channels
        self.has_map = has_map
        self.norm = norm
        self.frozen: Depth = "none"
        self.train()

    def freeze(self, depth: Depth) -> None:
        """Let nothing, the stem (the first layer group), or the whole network be a constant function of the images.

        What is frozen does not learn, and stays in evaluation mode in training too: its BatchNorm normalises by the
        statistics that it has, and nothing in it is dropped.
        """
        self.frozen = depth
        self.requires_grad_()
        frozen = self._frozen_parameters()
        for name, parameter in self.net.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
        self.train(self.training)

    def _frozen_parameters(self) -> set[str]:
        """Names in ``net``."""
        if self.frozen == "none":
            return set()
        deepest = 0 if self.frozen == "stem" else math.inf
        return {name for name, depth in layer_depths(self.net)[0].items() if depth <= deepest}

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        if self.norm == "frozen_batch":
            for layer in batch_norms(self.net):
                layer.eval()
        if self.frozen == "backbone":
            self.net.eval()
        elif self.frozen == "stem":
            frozen = self._frozen_parameters()
            for prefix, module in self.net.named_modules():
                inside = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
                if inside and frozen.issuperset(inside):
                    module.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Backbone:
        """Freeze or thaw the network, less the norms that ``model.norm`` keeps frozen whatever happens."""
        super().requires_grad_(requires_grad)
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
