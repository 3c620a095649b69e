"""The pixels of a view, made by one function for both decoding backends, on the CPU or on a GPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fpcn_dist.data.resizing import view_crop
from fpcn_dist.data.views import OPERATIONS
from fpcn_dist.recipe.schema import DataConfig

_LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in grey (ITU-R BT.601)."""
_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
"""RGB to luma and two axes of colour, in whose plane hues turn."""


def view_pixels(image_HWC: Tensor, view: np.void, config: DataConfig) -> Tensor:
    """Crop, flip, colours, policy and erasing of a view, in this order.

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
    if jitter != [1, 1, 1, 0]:
        pixels_HWC = color_jitter(pixels_HWC, *jitter)
    for operation, magnitude in zip(view["operations"].tolist(), view["magnitudes"].tolist(), strict=True):
        if operation:
            pixels_CHW = policy_operation(pixels_HWC.permute(2, 0, 1), OPERATIONS[int(operation)], magnitude)
            pixels_HWC = pixels_CHW.permute(1, 2, 0)
    top, left, height, width = map(int, view["erased"].tolist())
    if height:
        pixels_HWC = pixels_HWC.clone()
        pixels_HWC[top : top + height, left : left + width] = 0
    return pixels_HWC


def policy_operation(pixels_CHW: Tensor, operation: str, magnitude: float) -> Tensor:
    """An operation of TrivialAugmentWide or RandAugment as torchvision's classes of these names have it.

    Args:
        pixels_CHW: uint8.
        operation: one of :data:`fpcn_dist.data.views.OPERATIONS`.
        magnitude: slope (shear), pixels (translate), degrees (rotate), factor - 1, bits (posterize) or share of white
            (solarize).

    Returns:
        [C, H, W] uint8; black where the image has no pixels.
    """
    pixels, sheared = int(magnitude), math.degrees(math.atan(magnitude))
    match operation:
        case "Identity":
            return pixels_CHW
        case "ShearX":  # whose slope moves rows against the upper edge
            return F.affine(pixels_CHW, 0.0, [0, 0], 1.0, [sheared, 0.0], center=[0, 0])
        case "ShearY":
            return F.affine(pixels_CHW, 0.0, [0, 0], 1.0, [0.0, sheared], center=[0, 0])
        case "TranslateX":
            return F.affine(pixels_CHW, 0.0, [pixels, 0], 1.0, [0.0, 0.0])
        case "TranslateY":
            return F.affine(pixels_CHW, 0.0, [0, pixels], 1.0, [0.0, 0.0])
        case "Rotate":
            return F.rotate(pixels_CHW, magnitude)
        case "Brightness":
            return F.adjust_brightness(pixels_CHW, 1 + magnitude)
        case "Color":
            return F.adjust_saturation(pixels_CHW, 1 + magnitude)
        case "Contrast":
            return F.adjust_contrast(pixels_CHW, 1 + magnitude)
        case "Sharpness":
            return F.adjust_sharpness(pixels_CHW, 1 + magnitude)
        case "Posterize":
            return F.posterize(pixels_CHW, int(magnitude))
        case "Solarize":
            return F.solarize(pixels_CHW, 255 * magnitude)
        case "AutoContrast":
            return F.autocontrast(pixels_CHW)
        case "Equalize":
            return F.equalize(pixels_CHW)
    raise ValueError(f"no operation {operation!r}")


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
