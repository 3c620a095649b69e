"""This module draws the region that the network looked at over the image that it saw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fpcn_dist.recipe.schema import DataConfig

CONTOUR = (255, 176, 0)
"""The region's outline is amber, which stands out from rock, soil and vegetation alike."""
_DIM = 0.35


def to_pixels(image: Tensor, config: DataConfig) -> NDArray[np.uint8]:
    """Undo the normalisation that ``config`` names: [3, H, W] float -> [H, W, 3] uint8 on the CPU."""
    image_HWC = image.detach().float().cpu().permute(1, 2, 0).numpy()
    shown = config.preprocessing
    return (255 * np.clip(image_HWC * np.array(shown.std) + np.array(shown.mean), 0, 1)).round().astype(np.uint8)


def draw_overlay(pixels: NDArray[np.uint8], mask: NDArray[np.floating], side: int) -> Image.Image:
    """Draw the image with everything outside the region faded to a dim gray, and the region outlined.

    The mask is not smoothed: its cells are what the network has multiplied the features by.

    Args:
        pixels: [H, W, 3] uint8, the crop that the network saw.
        mask: [h, w], 1 inside the region and theta < 1 outside (eq. 3).
        side: width and height of the drawing in pixels.
    """
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
    cells = Image.fromarray((mask == 1).astype(np.uint8))
    inside = np.asarray(cells.resize((side, side), Image.Resampling.NEAREST), dtype=bool)
    colour = np.asarray(image, dtype=np.float32)
    gray = colour.mean(axis=2, keepdims=True)
    drawing = np.where(inside[..., None], colour, _DIM * gray)
    drawing[_outline(inside, width=max(2, side // 110))] = CONTOUR
    return Image.fromarray(drawing.round().astype(np.uint8))


def _outline(inside: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Find the pixels of ``inside`` within ``width`` of a border to the outside; the image's edge is no border."""
    eroded = np.pad(inside, width, mode="edge")
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(eroded, 2 * width + 1, axis=axis)
        eroded = windows.all(axis=-1)
    return inside & ~eroded
