"""Checks shared by the public functions: an error names the argument, what it got and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton", "reference")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must satisfy 0 <= {name} < 1, got {value}")


def check_floating(name: str, tensor: object, legend: str) -> None:
    """``tensor`` is a floating-point tensor with as many dimensions as ``legend`` has names, as in ``"[B, C]"``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {legend}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} {list(tensor.shape)} must be floating point, got {tensor.dtype}")
    if tensor.ndim != legend.count(",") + 1:
        raise ValueError(f"{name} must have shape {legend}, got {list(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, legend: str, expected: Sequence[int], device: torch.device) -> None:
    if list(tensor.shape) != list(expected):
        raise ValueError(f"{name} must have shape {legend} = {list(expected)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other arguments, got {tensor.device}")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an operand has it, else float32: low-precision operands accumulate in float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
