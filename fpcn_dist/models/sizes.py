"""Image sizes that a network refuses, in words."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fpcn_dist.runtime.errors import UserError

REFUSALS = (AssertionError, IndexError, RuntimeError, ValueError)
"""What the layers of published networks raise for images whose size they cannot take."""

_REACH = 32
"""Pixels on either side within which even sizes that work are looked for."""


def explain_refusal(
    net: nn.Module, features: Callable[[nn.Module, Tensor], Tensor], images: Tensor, published: int, error: Exception
) -> None:
    """Raise a UserError if ``error`` came of the size of ``images``, not of anything else.

    Which sizes work is found out by trying them on a twin of ``net`` that holds no numbers.

    Args:
        net: the network.
        features: its forward pass.
        images: [B, 3, H', W'], which it has refused.
        published: side in pixels of the images that it was published for.
        error: how it has refused them.

    Raises:
        UserError: it takes images of another size, but not of this one.
    """
    twin = copy.deepcopy(net).to("meta").eval()

    def works(height: int, width: int) -> bool:
        try:
            with torch.no_grad():
                features(twin, torch.empty(1, 3, height, width, device="meta"))
        except REFUSALS:
            return False
        return True

    height, width = images.shape[2:]
    if works(height, width) or not works(published, published):
        return
    first = height - height % 2
    ways = (range(first, max(0, height - _REACH - 1), -2), range(first + 2, height + _REACH + 1, 2))
    near = [next((side for side in sides if works(side, side)), None) for sides in ways]
    sides = [side for side in near if side is not None] or [published]
    why = f" ({str(error).rstrip('.')})" if isinstance(error, AssertionError) and str(error) else ""
    raise UserError(
        "data.crop",
        height if height == width else f"{height} x {width}",
        f"the network of this backbone ({type(net).__name__}) takes no images of this size{why}",
        f"use {' or '.join(map(str, sides))}",
    ) from error
