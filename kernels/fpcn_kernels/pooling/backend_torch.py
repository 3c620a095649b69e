"""masked_pool in plain PyTorch: any device, any size. docs/kernels.md derives it. Legend: see masked_pool.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpcn_kernels._validate import accumulation_dtype
from fpcn_kernels.pooling.regions import largest_region

# Images whose partial sums are held at once on the CPU: fresh memory costs it more than the sums.
_CHUNK_BYTES = 2**24


def forward(features: Tensor, companion: Tensor | None, theta: float, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled vectors [B, C], masks [B, H, W] and areas [B]."""
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


def backward(
    grad_pooled_BC: Tensor, mask_BHW: Tensor, area_B: Tensor, theta: float, dtype: torch.dtype, order: Sequence[int]
) -> Tensor:
    """Gradient of the features [B, C, H, W], stored with the dimensions in ``order``, the slowest first."""
    grad_BC = grad_pooled_BC * (area_B / mask_BHW[0].numel())[:, None]
    inside_BC, outside_BC = grad_BC.to(dtype), (grad_BC * theta).to(dtype)
    grad_BCHW = torch.empty_permuted(
        (*grad_BC.shape, *mask_BHW.shape[1:]), tuple(order), dtype=dtype, device=grad_BC.device
    )
    return torch.where((mask_BHW == 1)[:, None], inside_BC[..., None, None], outside_BC[..., None, None], out=grad_BCHW)


def _above_mean(feat_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels whose channel sum reaches its mean [B, H, W], and the mean [B]."""
    images = max(1, _CHUNK_BYTES // feat_BCHW[0].nbytes) if feat_BCHW.device.type == "cpu" else len(feat_BCHW)
    sum_BHW = torch.cat([_channel_sum(chunk) for chunk in feat_BCHW.split(images)])
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
