"""How the products of float32 matrices are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from fpcn_kernels._launch import rounds_products

Matmul = Literal["highest", "high"]
"""float32 throughout; or TF32, and float16 in the kernels of the contrast, which add up in float32."""


def default_matmul(precision: str, device: torch.device) -> Matmul:
    """``"high"`` beside bfloat16 on a GPU that has TF32 (Ampere, compute capability 8.0), else ``"highest"``."""
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "high" if precision == "bf16" and has_tf32 else "highest"


@contextlib.contextmanager
def multiplying(matmul: Matmul) -> Iterator[None]:
    """Let PyTorch compute such products so; what was set before is set again afterwards."""
    was_rounded = rounds_products()
    torch.set_float32_matmul_precision(matmul)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high" if was_rounded else "highest")
