"""Both operations written out from the equations: slow, obviously right, and differentiable by plain autograd. The
oracle of the tests and of the benchmarks, which shares no code with the backends, random numbers included.
"""

from __future__ import annotations

import math
from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

from fpcn_kernels.pairs.head import PairHead

_WORD = 0xFFFFFFFF


def masked_pool(
    features: Tensor, *, theta: float = 0.0, region: str = "threshold", companion: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled vectors [B, C], masks [B, H, W] and areas [B]; see :func:`fpcn_kernels.masked_pool`."""
    features = _at_least_float32(features)
    pooled, masks, areas = [], [], []
    for image, feat_CHW in enumerate(features):
        activation_HW = feat_CHW.detach().sum(0)
        finite = bool(activation_HW.isfinite().all())
        inside_HW = _above_mean(activation_HW)
        if region == "largest" and finite:
            inside_HW = _largest_region(inside_HW)
            if companion is not None:
                activation_HW = _at_least_float32(companion[image].detach()).sum(0)
                inside_HW = inside_HW & _above_mean(activation_HW)
                finite = bool(activation_HW.isfinite().all())
                if not inside_HW.any():
                    inside_HW = torch.ones_like(inside_HW)
        if not finite:
            inside_HW = torch.ones_like(inside_HW)
        mask_HW = torch.full_like(inside_HW, theta, dtype=features.dtype)
        mask_HW[inside_HW] = 1  # equation 3
        area = mask_HW.mean() if finite else mask_HW.new_tensor(math.nan)  # equation 4
        masked_CHW = area * mask_HW * feat_CHW  # equation 5
        pooled.append(masked_CHW.mean((1, 2)))  # equation 7
        masks.append(mask_HW)
        areas.append(area)
    return torch.stack(pooled), torch.stack(masks), torch.stack(areas)


def pair_contrast(
    pooled: Tensor,
    labels: Tensor,
    head: PairHead,
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    seed: int = 0,
    pairs: int | Tensor | None = None,
    shifts: int | None = None,
) -> Tensor:
    """Mean cross-entropy of the chosen pairs of images, both sides; see :func:`fpcn_kernels.pair_contrast`."""
    operands = (pooled, *head)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
    x_NC, in_weight, in_bias, out_weight, out_bias, cls_weight, cls_bias = (t.to(dtype) for t in operands)
    images = len(x_NC)
    if shifts is not None:
        chosen = [(a, (a + shift) % images) for shift in random_shifts(shifts, seed, images) for a in range(images)]
    elif pairs is None:
        chosen = [(a, b) for a in range(images) for b in range(images)]
    elif isinstance(pairs, int):
        chosen = [random_pair(index, seed, images) for index in range(pairs)]
    else:
        chosen = [(int(a), int(b)) for a, b in pairs]
    losses = []
    for a, b in chosen:
        hidden_D = in_weight @ torch.cat([x_NC[a], x_NC[b]]) + in_bias
        if activation == "relu":
            hidden_D = hidden_D.relu()
        if dropout:
            kept = [dropout_word(seed, a, b, unit) >= round(dropout * 2**32) for unit in range(len(hidden_D))]
            hidden_D = hidden_D * torch.tensor(kept, device=hidden_D.device) / (1 - dropout)
        fused_C = out_weight @ hidden_D + out_bias  # equation 6
        for image in (a, b):
            contrast_C = x_NC[image] * fused_C  # equations 8 and 9
            losses.append(F.cross_entropy(cls_weight @ contrast_C + cls_bias, labels[image]))
    loss = torch.stack(losses).mean()
    return loss if all(t.isfinite().all() for t in operands) else loss * math.nan


def mix(word: int) -> int:
    """The 32-bit integer hash of docs/kernels.md."""
    word ^= word >> 16
    word = word * 0x21F0AAAD & _WORD
    word ^= word >> 15
    word = word * 0x735A2D97 & _WORD
    return word ^ word >> 15


def dropout_word(seed: int, a: int, b: int, unit: int) -> int:
    """The 32-bit word that decides on hidden unit ``unit`` of pair (a, b)."""
    pair = mix(mix(_key(seed, 1) ^ a) ^ mix(_key(seed, 2) ^ b))
    return mix(pair ^ mix(_key(seed, 3) ^ unit))


def random_pair(index: int, seed: int, images: int) -> tuple[int, int]:
    """Pair number ``index`` of the keyed permutation of all ordered pairs: eight Feistel rounds modulo ``images``."""
    a, b = divmod(index, images)
    for step in range(8):
        word = mix(mix(_key(seed, 4) ^ step) ^ b)
        a, b = b, (a + (word * images >> 32)) % images
    return a, b


def random_shifts(count: int, seed: int, images: int) -> list[int]:
    """The shifts whose words are the smallest."""
    return sorted(range(images), key=lambda shift: mix(_key(seed, 5) ^ shift))[:count]


def _key(seed: int, domain: int) -> int:
    return mix(mix((seed & _WORD) ^ domain) ^ (seed >> 32 & _WORD))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _above_mean(activation_HW: Tensor) -> Tensor:
    """Equations 1 to 3; a constant map is all inside, whatever the rounding of its mean."""
    return activation_HW >= torch.minimum(activation_HW.mean(), activation_HW.max())


def _largest_region(inside_HW: Tensor) -> Tensor:
    """Breadth-first search from every pixel not yet reached, in row order; the first of the largest regions found."""
    height, width = inside_HW.shape
    largest: list[tuple[int, int]] = []
    todo = {(row, column) for row in range(height) for column in range(width) if inside_HW[row, column]}
    for start in sorted(todo):
        if start not in todo:
            continue
        todo.remove(start)
        region, queue = [start], deque([start])
        while queue:
            row, column = queue.popleft()
            for neighbour in [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                if neighbour in todo:
                    todo.remove(neighbour)
                    region.append(neighbour)
                    queue.append(neighbour)
        if len(region) > len(largest):
            largest = region
    result = torch.zeros_like(inside_HW)
    for row, column in largest:
        result[row, column] = True
    return result
