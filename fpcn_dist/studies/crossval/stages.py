"""A backbone in two pieces: what comes before its last stage, and the last stage: its layers of the coarsest map."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fpcn_dist.models import Backbone
from fpcn_dist.models.modes import evaluating
from fpcn_dist.runtime.errors import UserError


def split_last_stage(backbone: Backbone, side: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The layers up to the last one that makes the map smaller, and those after it, which are the last stage.

    The two share their weights with ``backbone``, and are together the same function.

    Args:
        backbone: a network whose layers follow one another.
        side: of the images, in pixels.

    Raises:
        UserError: the layers of the network do not follow one another.
    """
    layers = list(_layers(backbone.net))
    image = torch.rand(1, 3, side, side)
    with torch.no_grad(), evaluating(backbone):
        maps = [image]
        try:
            for layer in layers:
                maps.append(layer(maps[-1]))
            same = torch.allclose(maps[-1], backbone(image), atol=1e-5)
        except (RuntimeError, TypeError):
            same = False
    sides = [features.shape[-1] for features in maps]
    last = 1 + max((index for index, (before, after) in enumerate(pairwise(sides)) if after < before), default=0)
    if not same or last in (1, len(layers)):
        name, reason = type(backbone.net).__name__, "its layers do not follow one another, or it has one stage"
        raise UserError("--networks", name, reason, "take mobilenet_v2, a ResNet or an EfficientNet, or leave it out")
    return nn.Sequential(*layers[:last]), nn.Sequential(*layers[last:])


def _layers(net: Any) -> Iterator[nn.Module]:
    """The layers of a network in the order of their use, where it is a sequence of sequences or an EfficientNet."""
    children = net.children()
    if hasattr(net, "conv_stem"):
        children = (getattr(net, name) for name in ("conv_stem", "bn1", "blocks", "conv_head", "bn2"))
    for child in children:
        if type(child) is nn.Sequential:
            yield from _layers(child)
        else:
            yield child
