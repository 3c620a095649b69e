"""Masked pooling (equations 1 to 5 and 7): a map's own activations decide which of its pixels are averaged.

    A = sum_c F[c]                                  (1)
    t = mean_p A[p]                                 (2)
    M[p] = 1 where A[p] >= t, else theta            (3)
    alpha = mean_p M[p]                             (4)
    X[c] = mean_p alpha * M[p] * F[c, p]            (5, 7)

Legend: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpcn_kernels import reference
from fpcn_kernels._launch import use_triton
from fpcn_kernels._validate import (
    BACKENDS,
    accumulation_dtype,
    check_choice,
    check_floating,
    check_fraction,
    check_shape,
)
from fpcn_kernels.pooling import backend_torch

# The largest map that the fused kernels label within one program.
_MOST_PIXELS = 64 * 64


class MaskedPool(NamedTuple):
    """What :func:`masked_pool` returns: the pooled vectors, and the region that they come from."""

    pooled: Tensor
    """X [B, C]; carries the gradient."""
    mask: Tensor
    """M [B, H, W], 1 inside the region and theta outside; no gradient."""
    area: Tensor
    """alpha [B], the mean of the mask; no gradient."""


def masked_pool(
    features: Tensor,
    *,
    theta: float = 0.0,
    region: str = "threshold",
    companion: Tensor | None = None,
    backend: str = "auto",
) -> MaskedPool:
    """Average each feature map over the region where it is active (equations 1 to 5 and 7).

    A constant map is all inside. NaN or Inf in an image (or in its companion) makes the pooled vector and the area of
    that image NaN and its mask all ones, and affects no other image. No gradient flows through the mask and the area,
    and the gradient of the features cannot be differentiated again.

    Args:
        features: feature maps [B, C, H, W], float64, float32, bfloat16 or float16, of any strides.
        theta: value of the mask outside the region, 0 <= theta < 1.
        region: ``"threshold"``: every pixel whose channel sum reaches the mean (equation 3); ``"largest"``: only the
            largest 8-connected region of these, of equal ones the first in row order.
        companion: feature maps [B, C2, H, W] of the block before, with ``region="largest"`` only: the region is
            intersected with the companion's threshold mask; where nothing is left the whole map counts as inside.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`MaskedPool` of float32 tensors (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: the backend is not available.
    """
    check_floating("features", features, "[B, C, H, W]")
    if 0 in features.shape:
        raise ValueError(f"features [B, C, H, W] must not be empty, got {list(features.shape)}")
    check_fraction("theta", theta)
    check_choice("region", region, ("threshold", "largest"))
    if companion is not None:
        check_floating("companion", companion, "[B, C2, H, W]")
        batch, _, height, width = features.shape
        expected = (batch, companion.shape[1], height, width)
        check_shape("companion", companion, "[B, C2, H, W]", expected, features.device)
        if companion.shape[1] == 0:
            raise ValueError(f"companion [B, C2, H, W] must not be empty, got {list(companion.shape)}")
        if region != "largest":
            raise ValueError(f"companion needs region='largest', got region={region!r}")
    check_choice("backend", backend, BACKENDS)
    if backend == "reference":
        return MaskedPool(*reference.masked_pool(features, theta=theta, region=region, companion=companion))
    return MaskedPool(*_masked_pool(features, companion, float(theta), region == "largest", backend))


@torch.library.custom_op("fpcn::masked_pool", mutates_args=())
def _masked_pool(
    features: Tensor, companion: Tensor | None, theta: float, largest: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    span = sum((size - 1) * stride for size, stride in zip(features.shape[1:], features.stride()[1:], strict=True))
    kernels = _kernels(backend, features.device, accumulation_dtype(features), features.shape[2:], span)
    return kernels.forward(features, companion, theta, largest)


@_masked_pool.register_fake
def _(features, companion, theta, largest, backend):
    batch, channels, height, width = features.shape
    dtype = accumulation_dtype(features)
    return (
        features.new_empty(batch, channels, dtype=dtype),
        features.new_empty(batch, height, width, dtype=dtype),
        features.new_empty(batch, dtype=dtype),
    )


@torch.library.custom_op("fpcn::masked_pool_backward", mutates_args=())
def _masked_pool_backward(
    grad_pooled: Tensor,
    mask: Tensor,
    area: Tensor,
    theta: float,
    dtype: torch.dtype,
    order: Sequence[int],
    backend: str,
) -> Tensor:
    """dF [B, C, H, W] in ``dtype``, stored with the dimensions in ``order``, the slowest first."""
    size = mask[0].numel()
    kernels = _kernels(backend, mask.device, mask.dtype, mask.shape[1:], span=grad_pooled.shape[1] * size - 1)
    return kernels.backward(grad_pooled, mask, area, theta, dtype, order)


@_masked_pool_backward.register_fake
def _(grad_pooled, mask, area, theta, dtype, order, backend):
    return torch.empty_permuted((*grad_pooled.shape, *mask.shape[1:]), order, dtype=dtype, device=mask.device)


def _kernels(backend: str, device: torch.device, dtype: torch.dtype, size: Sequence[int], span: int):
    """The module that computes: backend_triton or backend_torch."""
    limit = None
    if size[0] * size[1] > _MOST_PIXELS or span >= 2**31:
        limit = (
            f"they take images of at most {_MOST_PIXELS} pixels and 2^31 elements, "
            f"got {size[0]} x {size[1]} pixels in {span + 1} elements"
        )
    if use_triton(backend, device, dtype, limit):
        from fpcn_kernels.pooling import backend_triton

        return backend_triton
    return backend_torch


def _setup_context(ctx, inputs, output):
    features, _, ctx.theta, _, ctx.backend = inputs
    _, mask, area = output
    ctx.mark_non_differentiable(mask, area)
    ctx.save_for_backward(mask, area)
    ctx.dtype = features.dtype
    ctx.order = sorted(range(4), key=features.stride, reverse=True)


def _backward(ctx, grad_pooled, _grad_mask, _grad_area):
    grad_features = _masked_pool_backward(grad_pooled, *ctx.saved_tensors, ctx.theta, ctx.dtype, ctx.order, ctx.backend)
    return grad_features, None, None, None, None


_masked_pool.register_autograd(_backward, setup_context=_setup_context)
