"""Masked pooling (equations 1 to 5 and 7): a map's own activations decide which of its pixels are averaged.

    A = sum_c F[c]                                  (1)
    t = mean_p A[p]                                 (2)
    M[p] = 1 where A[p] >= t, else theta            (3)
    alpha = mean_p M[p]                             (4)
    X[c] = mean_p alpha * M[p] * F[c, p]            (5, 7)

Legend: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fpcn_kernels import reference
from fpcn_kernels._regions import largest_region
from fpcn_kernels._validate import (
    accumulation_dtype,
    check_choice,
    check_floating,
    check_fraction,
    check_shape,
    resolve_backend,
)


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
    that image NaN and its mask all ones, and affects no other image. No gradient flows through the mask and the area.

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
    if resolve_backend(backend) == "reference":
        return MaskedPool(*reference.masked_pool(features, theta=theta, region=region, companion=companion))
    return MaskedPool(*_masked_pool(features, companion, float(theta), region == "largest"))


@torch.library.custom_op("fpcn::masked_pool", mutates_args=())
def _masked_pool(
    features: Tensor, companion: Tensor | None, theta: float, largest: bool
) -> tuple[Tensor, Tensor, Tensor]:
    feat_BCHW = features.to(accumulation_dtype(features))
    inside_BHW, mean_B = _above_mean(feat_BCHW)
    if largest:
        inside_BHW = largest_region(inside_BHW)
        if companion is not None:
            companion_inside_BHW, companion_mean_B = _above_mean(companion.to(feat_BCHW.dtype))
            inside_BHW = inside_BHW & companion_inside_BHW
            inside_BHW = inside_BHW | ~inside_BHW.flatten(1).any(1)[:, None, None]
            mean_B = mean_B + companion_mean_B
    # A comparison hides what is not finite, a multiplication by zero passes it on.
    inside_BHW = inside_BHW | ~mean_B.isfinite()[:, None, None]
    mask_BHW = mean_B.new_full(inside_BHW.shape, theta).masked_fill_(inside_BHW, 1)
    area_B = mask_BHW.mean((1, 2)) + 0 * mean_B
    weight_BHW = mask_BHW * (area_B / mask_BHW[0].numel())[:, None, None]
    pooled_BC = torch.bmm(feat_BCHW.flatten(2), weight_BHW.flatten(1).unsqueeze(2)).squeeze(2)
    return pooled_BC, mask_BHW, area_B


def _above_mean(feat_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels whose channel sum reaches its mean [B, H, W], and the mean [B]."""
    sum_BHW = _channel_sum(feat_BCHW)
    mean_B = sum_BHW.mean((1, 2))
    # No mean exceeds the maximum, but a rounded one can: without the bound a constant map could be all outside.
    threshold_B = torch.minimum(mean_B, sum_BHW.amax((1, 2)))
    return sum_BHW >= threshold_B[:, None, None], mean_B


def _channel_sum(feat_BCHW: Tensor) -> Tensor:
    """Pairwise, so that all pixels round alike: ``sum(1)`` adds the pixels that fill no vector register in another
    order, which leaves a constant map with a few pixels below its mean."""
    while (half := feat_BCHW.shape[1] // 2) > 0:
        folded_BCHW = feat_BCHW[:, :half] + feat_BCHW[:, half : 2 * half]
        folded_BCHW[:, 0] += feat_BCHW[:, 2 * half :].sum(1)
        feat_BCHW = folded_BCHW
    return feat_BCHW[:, 0]


@_masked_pool.register_fake
def _(features, companion, theta, largest):
    batch, channels, height, width = features.shape
    dtype = accumulation_dtype(features)
    return (
        features.new_empty(batch, channels, dtype=dtype),
        features.new_empty(batch, height, width, dtype=dtype),
        features.new_empty(batch, dtype=dtype),
    )


def _setup_context(ctx, inputs, output):
    features, _, theta, _ = inputs
    _, mask, area = output
    ctx.mark_non_differentiable(mask, area)
    ctx.save_for_backward(mask, area)
    ctx.dtype, ctx.theta = features.dtype, theta
    ctx.channels_last = features.is_contiguous(memory_format=torch.channels_last)


def _backward(ctx, grad_pooled, _grad_mask, _grad_area):
    mask_BHW, area_B = ctx.saved_tensors
    grad_BC = grad_pooled * (area_B / mask_BHW[0].numel())[:, None]
    inside_BC, outside_BC = grad_BC.to(ctx.dtype), (grad_BC * ctx.theta).to(ctx.dtype)
    region_BHW = mask_BHW == 1
    if ctx.channels_last:
        grad_BHWC = torch.where(region_BHW[..., None], inside_BC[:, None, None], outside_BC[:, None, None])
        grad_features = grad_BHWC.permute(0, 3, 1, 2)
    else:
        grad_features = torch.where(region_BHW[:, None], inside_BC[..., None, None], outside_BC[..., None, None])
    return grad_features, None, None, None


_masked_pool.register_autograd(_backward, setup_context=_setup_context)
