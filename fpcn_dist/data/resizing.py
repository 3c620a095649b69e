"""The resizing and cutting that both decoding backends share, on the CPU and, beside DALI's own, on a GPU.

An image is resized to its *frame*, of which the crop is a window: a square of ``resize`` pixels that the image is
squeezed into, or in which black bars fill it up (``pad``), or the image with a short side of that length. A random
resized crop is a window of the frame that is scaled to the size of the crop, straight from the image's own pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from fpcn_dist.recipe.schema import DataConfig


def view_crop(image_HWC: Tensor, view: np.void, config: DataConfig) -> Tensor:
    """Resize an image, antialiased, and cut it.

    Args:
        image_HWC: uint8, of any height and width.
        view: where the crop lies, and its scale where that is not the usual one.
        config: the sides of the resized image and of the crop, how the image becomes of that size, and the filter.

    Returns:
        [crop, crop, 3] uint8.
    """
    height, width = image_HWC.shape[:2]
    if view["scale"]:
        frame, part = _canvas(height, width, config), image_HWC
        rows, columns = _window(view, *frame, config)
    else:
        part = _resize(image_HWC, content_size(height, width, config), config)
        frame = (config.resize, config.resize) if config.fit == "pad" else tuple(part.shape[:2])
        rows = columns = config.crop
    top, left = round(view["down"] * (frame[0] - rows)), round(view["right"] * (frame[1] - columns))
    above, before = (frame[0] - part.shape[0]) // 2, (frame[1] - part.shape[1]) // 2
    cut_HWC = _cut(part, top - above, left - before, rows, columns)
    return _resize(cut_HWC, (config.crop, config.crop), config) if view["scale"] else cut_HWC


def content_size(height: int, width: int, config: DataConfig) -> tuple[int, int]:
    """Height and width in pixels that an image of the given ones is resized to."""
    side = config.resize
    if config.fit == "squeeze":
        return side, side
    if config.fit == "short_side":
        short = min(height, width)
        return side * height // short, side * width // short
    long = max(height, width)
    return max(1, round(side * height / long)), max(1, round(side * width / long))


def _canvas(height: int, width: int, config: DataConfig) -> tuple[int, int]:
    """The frame in pixels of the image itself."""
    long = max(height, width)
    return (long, long) if config.fit == "pad" else (height, width)


def _window(view: np.void, height: int, width: int, config: DataConfig) -> tuple[int, int]:
    """Height and width of a random resized crop in a frame given in pixels of the image."""
    # A squeezed frame is square, whatever the image is.
    aspect = 1.0 if config.fit == "squeeze" else width / height
    down = math.sqrt(view["scale"] / view["ratio"] * aspect)
    across = math.sqrt(view["scale"] * view["ratio"] / aspect)
    return max(1, round(height * min(1.0, down))), max(1, round(width * min(1.0, across)))


def _cut(image_HWC: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """A window of an image, black where it reaches beyond."""
    below, after = top + height, left + width
    inside = image_HWC[max(top, 0) : max(below, 0), max(left, 0) : max(after, 0)]
    missing = [max(-left, 0), 0, max(-top, 0), 0]
    missing[1], missing[3] = width - inside.shape[1] - missing[0], height - inside.shape[0] - missing[2]
    return pad(inside, [0, 0, *missing]) if any(missing) else inside


def _resize(image_HWC: Tensor, size: tuple[int, int], config: DataConfig) -> Tensor:
    mode = config.preprocessing.interpolation
    image_BCHW = image_HWC.permute(2, 0, 1)[None]
    native = image_HWC.device.type == "cpu"  # elsewhere PyTorch has no filter for uint8
    resized_BCHW = interpolate(image_BCHW if native else image_BCHW.float(), size=size, mode=mode, antialias=True)
    if not native:
        resized_BCHW = resized_BCHW.round_().clamp_(0, 255).to(torch.uint8)
    return resized_BCHW[0].permute(1, 2, 0)
