"""How the kernels see a tensor, which tiles they take of it, and how many images pooling lags behind summing.

Legend: C channels, S pixels of an image; a program's tile is BP pixels by BC channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpcn_kernels._launch import l2_bytes, multiprocessors

# Features of a program, all of them in flight at once: the first that lets the L2 hold what is read again.
_TILE_BYTES = (2**15, 2**14)
# Warps that a multiprocessor runs at once, with the 80 registers that the kernel takes.
_RESIDENT_WARPS = 24
# The widest load of a thread.
_LOAD_BYTES = 16
# Channels in one run: their windows are pooled one after the other, each too small beyond this to keep memory busy.
_MOST_FOLD = 4

Layout = tuple[int, int, int, int, int, int]
"""C, S, width and the strides of channels, rows and columns: constants, so that the compiler knows their alignment."""


def layout(tensor: Tensor) -> Layout:
    """The layout of an image of ``tensor`` [B, C, H, W]."""
    _, channels, height, width = tensor.shape
    stride_c, stride_h, stride_w = tensor.stride()[1:]
    return channels, height * width, width, stride_c, stride_h, stride_w


def fold(layout: Layout, itemsize: int) -> int:
    """How many channels are read as one run, so that every run begins where a thread may load 16 bytes.

    A channel of 14 x 14 pixels in bfloat16 takes 392 bytes, which 8 divides and 16 does not: of two it is 784.
    """
    channels, pixels, width, *strides = layout
    if strides != [pixels, width, 1]:
        return 1
    folds = [m for m in (1, 2, _MOST_FOLD) if channels % m == 0]
    return max(folds, key=lambda m: (math.gcd(m * pixels * itemsize, _LOAD_BYTES), -m))


def configurations(layout: Layout, itemsize: int, fold: int, tile_bytes: int = _TILE_BYTES[0]) -> list[dict[str, int]]:
    """Tiles of a tensor, the known-good one first."""
    channels, pixels = layout[0] // fold, layout[1]
    # One program finds the mask of a whole image, in registers.
    warps = max(4, _power_of_2(pixels) // 256)
    table = []
    for size, rows, num_warps in [
        (tile_bytes, 256, warps),
        (tile_bytes, 256, 2 * warps),
        (tile_bytes, 128, warps),
        (tile_bytes // 2, 256, warps),
    ]:
        BP = min(rows, _power_of_2(pixels)) * fold
        BC = max(1, min(size // (BP * itemsize), _power_of_2(channels), 1024))
        table.append({"BP": BP, "BC": BC, "num_warps": num_warps})
    return table


def forward_configurations(layout: Layout, itemsize: int, fold: int, device: torch.device) -> list[dict[str, int]]:
    """The largest tiles with which the L2 keeps features until they are pooled, or else the largest."""
    tables = [configurations(layout, itemsize, fold, tile_bytes) for tile_bytes in _TILE_BYTES]
    return next((table for table in tables if lag(layout, itemsize, fold, table[0], device)), tables[0])


def lag(layout: Layout, itemsize: int, fold: int, config: dict[str, int], device: torch.device) -> int | None:
    """How many images later an image is pooled; None if the L2 is too small, and features must be read twice.

    As many images as the multiprocessors have in work, for the mask to be there, and a quarter more, for the features
    still to be there as far as half the L2 holds them: those of an A100 and of an H100 are two partitions, and a line
    that multiprocessors on both sides read may lie in both.
    """
    channels, pixels = layout[0] // fold, layout[1]
    splits = -(-channels // config["BC"])
    resident = multiprocessors(device) * _RESIDENT_WARPS // config["num_warps"]
    most = l2_bytes(device) // 2 // (channels * fold * pixels * itemsize)
    least = max(1, -(-resident // splits))
    return min(most, -(-resident * 5 // (4 * splits))) if most >= least else None


def _power_of_2(size: int) -> int:
    """The first that is not smaller."""
    return 1 << (size - 1).bit_length()
