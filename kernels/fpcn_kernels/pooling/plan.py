"""How the kernels see a tensor, which tiles they take of it, and how many images pooling lags behind summing.

Legend: C channels, S pixels of an image; a program's tile is BP pixels by BC channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fpcn_kernels._launch import l2_bytes, multiprocessors

# Features of a program, all of them in flight at once: the first that lets the L2 hold what is read again.
_TILE_BYTES = (2**15, 2**14)
# Warps that a multiprocessor runs at once, with the 80 registers that the kernel takes.
RESIDENT_WARPS = 24
# An L2 of two partitions (A100, H100, H200) may hold a line twice, once for the multiprocessors of either side. Half of
# the lines are read by the other side than their own: two thirds then hold different ones. Assumed, not measured.
L2_SHARE = 2 / 3
# The widest load of a thread.
_LOAD_BYTES = 16
# Channels in one run: their windows are pooled one after the other, each too small beyond this to keep memory busy.
_MOST_FOLD = 4


class View(NamedTuple):
    """How the kernels see an image of a tensor."""

    layout: tuple[int, ...]
    """C, S, width and the strides of channels, rows, columns: constants, so that the compiler knows their alignment."""
    fold: int
    """How many channels are read as one run, so that every run begins where a thread may load 16 bytes.

    A channel of 14 x 14 pixels in bfloat16 takes 392 bytes, which 8 divides and 16 does not; two take 784.
    """
    itemsize: int

    @property
    def image_bytes(self) -> int:
        return self.layout[0] * self.layout[1] * self.itemsize

    def splits(self, config: dict[str, int]) -> int:
        """Programs of an image."""
        return -(-self.layout[0] // (self.fold * config["BC"]))


def view(tensor: Tensor) -> View:
    """How the kernels see ``tensor`` [B, C, H, W]."""
    _, channels, height, width = tensor.shape
    pixels, strides = height * width, tensor.stride()[1:]
    folds = [1]
    if strides == (pixels, width, 1):
        folds += [fold for fold in (2, _MOST_FOLD) if channels % fold == 0]
    fold = max(folds, key=lambda fold: (math.gcd(fold * pixels * tensor.element_size(), _LOAD_BYTES), -fold))
    return View((channels, pixels, width, *strides), fold, tensor.element_size())


def configurations(view: View, tile_bytes: int = _TILE_BYTES[0]) -> list[dict[str, int]]:
    """Tiles of a tensor, the known-good one first."""
    channels, pixels = view.layout[0] // view.fold, _power_of_2(view.layout[1])
    # One program finds the mask of a whole image, in registers.
    warps = max(4, pixels // 256)
    table = []
    for size, rows, num_warps in [
        (tile_bytes, 256, warps),
        (tile_bytes, 256, 2 * warps),
        (tile_bytes, 128, warps),
        (tile_bytes // 2, 256, warps),
    ]:
        BP = min(rows, pixels) * view.fold
        BC = max(1, min(size // (BP * view.itemsize), _power_of_2(channels), 1024))
        table.append({"BP": BP, "BC": BC, "num_warps": num_warps})
    return table


def forward_configurations(view: View, device: torch.device) -> list[dict[str, int]]:
    """The largest tiles with which the L2 keeps features until they are pooled; the largest where none are."""
    tables = [configurations(view, tile_bytes) for tile_bytes in _TILE_BYTES]
    return next((table for table in tables if lag(view, table[0], device)), tables[0])


def lag(view: View, config: dict[str, int], device: torch.device) -> int | None:
    """How many images later an image is pooled; None if the L2 is too small, and features must be read twice.

    At least as many as the multiprocessors have in work, for the mask to be there; a quarter more if the L2 still has
    the features then. Between the two reads of a tile others read ``lag`` images, and half of what is in work while
    a program adds up and counts: 35 MB on an H100 (``python -m benchmarks masked_pool --model``).
    """
    in_work = multiprocessors(device) * RESIDENT_WARPS / config["num_warps"] / view.splits(config)
    most = int(l2_bytes(device) * L2_SHARE / view.image_bytes - in_work / 2)
    least = math.ceil(in_work)
    return min(most, math.ceil(1.25 * in_work)) if most >= least else None


def _power_of_2(size: int) -> int:
    """The first that is not smaller."""
    return 1 << (size - 1).bit_length()
