"""Checks of what pair_contrast is given: an error names the argument, what it got and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from fpcn_kernels._validate import check_floating, check_shape
from fpcn_kernels.pairs.head import PairHead


def check_operands(pooled: Tensor, labels: Tensor, head: PairHead) -> None:
    if not isinstance(head, PairHead):
        raise TypeError(f"head must be a PairHead, got {_kind(head)}")
    check_floating("pooled", pooled, "[B, C]")
    check_floating("fuse_in_weight", head.fuse_in_weight, "[D, 2C]")
    check_floating("classifier_weight", head.classifier_weight, "[K, C]")
    (batch, channels), width, classes = pooled.shape, len(head.fuse_in_weight), len(head.classifier_weight)
    expected = [
        ("[D, 2C]", (width, 2 * channels)),
        ("[D]", (width,)),
        ("[C, D]", (channels, width)),
        ("[C]", (channels,)),
        ("[K, C]", (classes, channels)),
        ("[K]", (classes,)),
    ]
    for (name, tensor), (legend, shape) in zip(head._asdict().items(), expected, strict=True):
        check_floating(name, tensor, legend)
        check_shape(name, tensor, legend, shape, pooled.device)
    for name, size in (("C", channels), ("D", width), ("K", classes)):
        if size == 0:
            raise ValueError(
                f"{name} must be at least 1, got pooled {list(pooled.shape)}, fuse_in_weight "
                f"{list(head.fuse_in_weight.shape)}, classifier_weight {list(head.classifier_weight.shape)}"
            )
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor [B], got {_kind(labels)}")
    check_shape("labels", labels, "[B]", (batch,), pooled.device)


def check_pairs(pairs: int | Tensor | None, device: torch.device) -> None:
    if pairs is None:
        return
    if isinstance(pairs, Tensor) and pairs.dtype == torch.int64:
        if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
            raise ValueError(f"pairs must be a list [P, 2] of at least one pair, got {list(pairs.shape)}")
        check_shape("pairs", pairs, "[P, 2]", pairs.shape, device)
    elif isinstance(pairs, bool) or not isinstance(pairs, int):
        raise TypeError(f"pairs must be None, an int or an int64 tensor [P, 2], got {_kind(pairs)}")
    elif pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor) and seed.dtype == torch.int64:
        if seed.ndim:
            raise ValueError(f"seed must have no dimension, got {list(seed.shape)}")
        return seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or a 0-dim int64 tensor, got {_kind(seed)}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    # Filled on the device: a copy from the host could not be captured in a CUDA graph.
    return torch.full((), seed, dtype=torch.int64, device=device)


def check_shifts(shifts: int | None, pairs: int | Tensor | None) -> None:
    if shifts is None:
        return
    if pairs is not None:
        raise ValueError("pairs and shifts exclude each other, got both")
    if isinstance(shifts, bool) or not isinstance(shifts, int):
        raise TypeError(f"shifts must be None or an int, got {_kind(shifts)}")
    if shifts < 1:
        raise ValueError(f"shifts must be at least 1, got {shifts}")


def check_count(count: int | None, shifts: int | None, images: int) -> None:
    """What only the size of the global batch tells."""
    if images == 0:
        raise ValueError("pooled [B, C] must hold at least one image over all ranks, got none")
    if count is not None and count > images**2:
        raise ValueError(f"pairs {count} exceeds the {images}^2 = {images**2} ordered pairs of the batch")
    if shifts is not None and shifts > images:
        raise ValueError(f"shifts {shifts} exceeds the {images} images of the batch")


def in_bounds(name: str, index: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """``index`` within [0, end), and a summand of the scale: NaN if it was not, else 0.

    On the CPU it raises ValueError instead. Reading the values of an accelerator would wait for it in every step.
    """
    if index.device.type == "cpu" and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{name} {list(index.shape)} must lie in [0, {end}), got values from {low} to {high}")
    return clamped(index, end)


def clamped(index: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """``index`` moved into [0, end), and NaN, 0-dim, if anything had to be moved, else 0; without reading values."""
    inside = index.clamp(0, end - 1)
    return inside, torch.where((inside != index).any(), torch.nan, 0.0)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
