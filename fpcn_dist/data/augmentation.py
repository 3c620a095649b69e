"""The pixels of a view, made by one function for both decoding backends, on the CPU or on a GPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fpcn_dist.data.resizing import view_crop
from fpcn_dist.recipe.schema import DataConfig

_LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in grey (ITU-R BT.601)."""
_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
"""RGB to luma and two axes of colour, in whose plane hues turn."""


def view_pixels(image_HWC: Tensor, view: np.void, config: DataConfig) -> Tensor:
    """Crop, flip and colours of a view, in this order.

    Args:
        image_HWC: uint8, of any height and width.
        view: one of :data:`fpcn_dist.data.views.VIEW`.
        config: sizes.

    Returns:
        [crop, crop, 3] uint8.
    """
    pixels_HWC = view_crop(image_HWC, view, config)
    if view["flip"]:
        pixels_HWC = pixels_HWC.flip(1)
    jitter = [view[name].item() for name in ("brightness", "contrast", "saturation", "hue")]
    return pixels_HWC if jitter == [1, 1, 1, 0] else color_jitter(pixels_HWC, *jitter)


def color_jitter(pixels_HWC: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Brightness, then contrast around the mean grey, then saturation, then hue, rounded and clipped once at the end.

    All four are linear in the colours, so that one product does them:

        x' = b c H S x + b (1 - c) g    S = s I + (1 - s) 1 l^T    H = Y^-1 R(hue) Y

    with the luma weights l, the mean grey g of the view, and R a turn in the colour plane of YIQ. Brightness, contrast
    and saturation are those of torchvision and Pillow, which round and clip after each; the hue is that of DALI, which
    keeps the luma, where torchvision turns it in HSV.

    Args:
        pixels_HWC: uint8.
        brightness, contrast, saturation: b, c, s; at least 0.
        hue: share of a turn.

    Returns:
        [H, W, 3] uint8.
    """
    angle = 2 * math.pi * hue
    turn = np.eye(3)
    turn[1:, 1:] = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    matrix = np.linalg.inv(_YIQ) @ turn @ _YIQ @ (saturation * np.eye(3) + (1 - saturation) * _LUMA)
    colours = pixels_HWC.reshape(-1, 3).float()
    weights = torch.from_numpy(np.stack([*(brightness * contrast * matrix), brightness * (1 - contrast) * _LUMA]))
    weights = weights.to(colours)
    changed = torch.addmm(weights[3] @ colours.mean(dim=0).unsqueeze(1), colours, weights[:3].T)
    return changed.round_().clamp_(0, 255).to(torch.uint8).view(pixels_HWC.shape)
