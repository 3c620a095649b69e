"""Connected regions of binary maps, labelled on the device without a host synchronisation.

Legend: B maps of P = H * W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def largest_region(inside_BHW: Tensor) -> Tensor:
    """The largest 8-connected region of each boolean map [B, H, W]; of equal ones the first in row order.

    Boruvka's scheme with a fixed number of steps. In every round a region that still has neighbours joins the neighbour
    of smallest label. Cycles of this choice have length two, and are cut at their smaller label, so each round at least
    halves the number of parts of every region: ceil(log2 P) rounds suffice, however winding the region. Joining leaves
    chains no longer than the number of parts, which pointer doubling flattens. A region ends up labelled with its
    first pixel. A map with nothing inside stays empty.
    """
    height, width = inside_BHW.shape[1:]
    pixels = height * width
    inside_BP = inside_BHW.flatten(1)
    # Label P stands for "none": outside pixels, and the padding round the map.
    label_BP = torch.where(inside_BP, torch.arange(pixels, device=inside_BP.device), pixels)
    parts = pixels
    while parts > 1:
        nearest_BP = _smallest_other_neighbour(label_BP.unflatten(1, (height, width)), none=pixels).flatten(1)
        own = torch.arange(pixels + 1, device=label_BP.device).expand(len(label_BP), -1)
        target = torch.full_like(own, pixels).scatter_reduce(1, label_BP, nearest_BP, "amin")
        target[:, pixels] = pixels
        alone_or_smaller_of_two = (target == pixels) | ((target.gather(1, target) == own) & (own < target))
        parent = torch.where(alone_or_smaller_of_two, own, target)
        for _ in range((parts - 1).bit_length()):
            parent = parent.gather(1, parent)
        label_BP = parent.gather(1, label_BP)
        parts = parts // 2
    size = torch.zeros_like(F.pad(label_BP, (0, 1))).scatter_add_(1, label_BP, torch.ones_like(label_BP))
    largest_B1 = size[:, :pixels].argmax(1, keepdim=True)
    return ((label_BP == largest_B1) & inside_BP).unflatten(1, (height, width))


def _smallest_other_neighbour(label_BHW: Tensor, none: int) -> Tensor:
    """For each pixel the smallest label unlike its own among its eight neighbours, or ``none``."""
    height, width = label_BHW.shape[1:]
    padded = F.pad(label_BHW, (1, 1, 1, 1), value=none)
    smallest = torch.full_like(label_BHW, none)
    for row in range(3):
        for column in range(3):
            label = padded[:, row : row + height, column : column + width]
            smallest = torch.minimum(smallest, torch.where(label == label_BHW, none, label))
    return smallest
