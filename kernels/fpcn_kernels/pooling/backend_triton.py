"""masked_pool in fused kernels: the features are read from memory once, and their gradient is written once.
docs/kernels.md has the plan, its floor, and why no program waits for another.

Legend: see masked_pool.py; P = H * W pixels of a tile, C channels of a tile, R rows of partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpcn_kernels._launch import choose, launch
from fpcn_kernels.pooling import plan


# What differs between batches only must not compile anew.
@triton.jit(do_not_specialize=["lag"])
def _mask_kernel(
    features,
    partial,
    counts,
    queue,
    mask,
    area,
    companion_mask,
    companion_area,
    labels,
    pooled,
    theta,
    lag,
    stride_b,
    LAYOUT: tl.constexpr,
    FOLD: tl.constexpr,
    LARGEST: tl.constexpr,
    COMPANION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """A program sums some channels of image b; the last one of an image finds its mask. Then it pools these channels of
    image b - lag, or, where the mask is not there yet, leaves them in the queue.

    counts: length of the queue, and for each image how many programs have summed, one more once its mask is there.
    """
    C: tl.constexpr = LAYOUT[0]
    S: tl.constexpr = LAYOUT[1]
    splits: tl.constexpr = (C // FOLD + BC - 1) // BC
    b = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    rows: tl.constexpr = splits * FOLD
    _sum_channels(features + b * stride_b, partial + b * rows * S, split, LAYOUT, FOLD, BP, BC)
    # Every thread's sums are stored before one thread says so.
    tl.debug_barrier()
    if tl.atomic_add(counts + 1 + b, 1, sem="acq_rel") == splits - 1:
        companion = (companion_mask + b * S, companion_area + b)
        scratch = labels + b * 2 * S
        _find_mask(
            partial + b * rows * S, mask + b * S, area + b, companion, scratch, theta, rows, LAYOUT, LARGEST, COMPANION
        )
        tl.debug_barrier()
        tl.atomic_add(counts + 1 + b, 1, sem="release")
    if b >= lag:
        b -= lag
        if tl.atomic_add(counts + 1 + b, 0, sem="acquire") <= splits:
            tl.store(queue + tl.atomic_add(counts, 1, sem="relaxed"), (b * splits + split).to(tl.int32))
        else:
            _pool_channels(features + b * stride_b, mask + b * S, area + b, pooled + b * C, split, LAYOUT, FOLD, BP, BC)


@triton.jit(do_not_specialize=["first"])
def _pool_kernel(
    features,
    counts,
    queue,
    mask,
    area,
    pooled,
    first,
    stride_b,
    LAYOUT: tl.constexpr,
    FOLD: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """A program pools some channels of one of the images from the first on, and its share of the queue."""
    C: tl.constexpr = LAYOUT[0]
    S: tl.constexpr = LAYOUT[1]
    splits: tl.constexpr = (C // FOLD + BC - 1) // BC
    programs = tl.num_programs(0)
    for turn in range(tl.program_id(0), programs + tl.load(counts), programs):
        left = tl.load(queue + turn - programs, mask=turn >= programs, other=0)
        item = tl.where(turn < programs, first * splits + turn, left)
        b = (item // splits).to(tl.int64)
        split = item % splits
        _pool_channels(features + b * stride_b, mask + b * S, area + b, pooled + b * C, split, LAYOUT, FOLD, BP, BC)


@triton.jit
def _backward_kernel(grad_pooled, mask, area, grad, stride_b, LAYOUT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """A program writes a tile of the gradient of an image."""
    C: tl.constexpr = LAYOUT[0]
    S: tl.constexpr = LAYOUT[1]
    splits: tl.constexpr = (C + BC - 1) // BC
    tiles: tl.constexpr = splits * ((S + BP - 1) // BP)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    c = tile % splits * BC + tl.arange(0, BC)
    p = tile // splits * BP + tl.arange(0, BP)
    grad_C = tl.load(grad_pooled + b * C + c, mask=c < C, other=0.0) * _over(tl.load(area + b), S)
    mask_P = tl.load(mask + b * S + p, mask=p < S, other=0.0)
    grad_PC = (mask_P[:, None] * grad_C[None, :]).to(grad.dtype.element_ty)
    tl.store(grad + b * stride_b + _offsets(p, c, LAYOUT, 1), grad_PC, mask=(p < S)[:, None] & (c < C)[None, :])


@triton.jit
def _sum_channels(
    features, partial, split, LAYOUT: tl.constexpr, FOLD: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """partial[split] = sums over the split's channels, in the same order for every pixel, in float32; of folded
    channels [FOLD, S]."""
    C: tl.constexpr = LAYOUT[0] // FOLD
    S: tl.constexpr = LAYOUT[1] * FOLD
    c = split * BC + tl.arange(0, BC)
    for first in range(0, S, BP):
        p = first + tl.arange(0, BP)
        within = (p < S)[:, None] & (c < C)[None, :]
        # They are read once more: let other lines leave the cache first.
        feat_PC = tl.load(features + _offsets(p, c, LAYOUT, FOLD), mask=within, other=0.0, eviction_policy="evict_last")
        tl.store(partial + split * S + p, tl.sum(feat_PC.to(tl.float32), 1), mask=p < S)


@triton.jit
def _pool_channels(
    features, mask, area, pooled, split, LAYOUT: tl.constexpr, FOLD: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """pooled[c] = sum_p alpha / S * M[p] * F[c, p] for the split's channels."""
    C: tl.constexpr = LAYOUT[0] // FOLD
    S: tl.constexpr = LAYOUT[1]
    V: tl.constexpr = 128 // features.dtype.element_ty.primitive_bitwidth
    c = split * BC + tl.arange(0, BC)
    scale = _over(tl.load(area), S)
    for channel in tl.static_range(FOLD):
        # The pixels of one of the folded channels, and so many before and after them that no load of V is cut. These
        # weigh nothing: if they are not finite, no pooled value of the image is.
        own = channel * S
        start = own // V * V
        end = min((own + S + V - 1) // V * V, FOLD * S)
        pooled_C = tl.zeros([BC], tl.float32)
        for first in range(start, end, BP // FOLD):
            p = first + tl.arange(0, BP // FOLD)
            weight_P = scale * tl.load(mask + p - own, mask=(p >= own) & (p < own + S), other=0.0)
            within = (p < end)[:, None] & (c < C)[None, :]
            # Nobody reads them again: these lines may leave the cache first.
            offsets_PC = _offsets(p, c, LAYOUT, FOLD)
            feat_PC = tl.load(features + offsets_PC, mask=within, other=0.0, eviction_policy="evict_first")
            pooled_C += tl.sum(weight_P[:, None] * feat_PC.to(tl.float32), 0)
        tl.store(pooled + c * FOLD + channel, pooled_C, mask=c < C)


@triton.jit
def _find_mask(
    partial,
    mask,
    area,
    companion,
    labels,
    theta,
    rows: tl.constexpr,
    LAYOUT: tl.constexpr,
    LARGEST: tl.constexpr,
    COMPANION: tl.constexpr,
):
    """Equations 1 to 4 for one image, from the rows of its partial sums."""
    S: tl.constexpr = LAYOUT[1]
    SP: tl.constexpr = triton.next_power_of_2(S)
    R: tl.constexpr = min(triton.next_power_of_2(rows), max(1, 4096 // SP))
    p = tl.arange(0, SP)
    sum_RP = tl.zeros([R, SP], tl.float32)
    for first in range(0, rows, R):
        r = first + tl.arange(0, R)
        sum_RP += tl.load(
            partial + (r * S)[:, None] + p[None, :], mask=(r < rows)[:, None] & (p < S)[None, :], other=0.0
        )
    sum_P = tl.sum(sum_RP, 0)
    mean = _over(tl.sum(sum_P, 0), S)
    # No mean exceeds the maximum, but a rounded one can: without the bound a constant map could be all outside.
    threshold = tl.minimum(mean, tl.max(tl.where(p < S, sum_P, -float("inf")), 0))
    inside_P = (sum_P >= threshold) & (p < S)
    # A comparison hides what is not finite, a multiplication by zero passes it on.
    poison = 0 * mean
    if LARGEST:
        inside_P = _largest_region(inside_P, labels, labels + S, S, LAYOUT[2], SP)
    if COMPANION:
        inside_P = inside_P & (tl.load(companion[0] + p, mask=p < S, other=0.0) > 0)
        inside_P = inside_P | (tl.max(inside_P.to(tl.int32), 0) == 0)
        poison += 0 * tl.load(companion[1])
    mask_P = tl.where(poison == 0, tl.where(inside_P, 1.0, theta), 1.0).to(tl.float32)
    tl.store(mask + p, mask_P, mask=p < S)
    tl.store(area, _over(tl.sum(tl.where(p < S, mask_P, 0.0), 0), S) + poison)


@triton.jit
def _largest_region(inside_P, label, size, S: tl.constexpr, W: tl.constexpr, SP: tl.constexpr):
    """The largest 8-connected region of a map, of equal ones the first in row order; label and size are scratch [S].

    Every part joins the neighbour with the smallest label, if that is smaller than its own, until none is.
    """
    p = tl.arange(0, SP)
    row, column = p // W, p % W
    label_P = tl.where(inside_P, p, S)
    tl.store(label + p, label_P, mask=p < S)
    tl.store(size + p, 0, mask=p < S)
    tl.debug_barrier()
    joining = tl.max(inside_P.to(tl.int32), 0)
    while joining > 0:
        smallest_P = label_P
        for step in tl.static_range(9):
            r, c = row + (step // 3 - 1), column + (step % 3 - 1)
            within = (r >= 0) & (r < S // W) & (c >= 0) & (c < W)
            smallest_P = tl.minimum(smallest_P, tl.load(label + r * W + c, mask=inside_P & within, other=S))
        joins_P = smallest_P < label_P
        tl.debug_barrier()
        tl.atomic_min(label + label_P, smallest_P, mask=joins_P, sem="relaxed")
        tl.debug_barrier()
        joining = tl.max(joins_P.to(tl.int32), 0)
        # Pointer doubling: afterwards a pixel's label is its part's first pixel, which is labelled with itself.
        moving = joining
        while moving > 0:
            parent_P = tl.load(label + label_P, mask=inside_P, other=S)
            tl.debug_barrier()
            tl.store(label + p, parent_P, mask=inside_P)
            tl.debug_barrier()
            moving = tl.max((parent_P != label_P).to(tl.int32), 0)
            label_P = parent_P
    tl.atomic_add(size + label_P, 1, mask=inside_P, sem="relaxed")
    tl.debug_barrier()
    # Of equal sizes the smaller label makes the larger key.
    key_P = tl.load(size + p, mask=p < S, other=0) * SP + (SP - 1 - p)
    return inside_P & (label_P == SP - 1 - tl.max(key_P, 0) % SP)


@triton.jit
def _offsets(p, c, LAYOUT: tl.constexpr, FOLD: tl.constexpr):
    """Where pixels p and channels c of an image lie, [P, C]; of folded channels p runs on through FOLD of them."""
    W: tl.constexpr = LAYOUT[2]
    stride_h: tl.constexpr = LAYOUT[4]
    stride_w: tl.constexpr = LAYOUT[5]
    pixel_P = p * stride_w if stride_h == W * stride_w else p // W * stride_h + p % W * stride_w
    return pixel_P[:, None] + (c * (LAYOUT[3] * FOLD))[None, :]


@triton.jit
def _over(x, S: tl.constexpr):
    """x / S, correctly rounded, so that S / S is 1."""
    return tl.div_rn(x, tl.full((), S, tl.float32))


def forward(features: Tensor, companion: Tensor | None, theta: float, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled vectors [B, C], masks [B, H, W] and areas [B]."""
    if companion is not None:
        _, *region = _run(companion, 0.0, largest=False, companion=None, pool=False)
        return _run(features, theta, largest, region, pool=True)
    return _run(features, theta, largest, None, pool=True)


def _run(
    features: Tensor, theta: float, largest: bool, companion: list[Tensor] | None, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = features.shape
    pixels = height * width
    pooled_BC, mask_BHW, area_B, labels_B2S = (
        features.new_empty(shape, dtype=dtype)
        for shape, dtype in [
            ((batch, channels if pool else 0), torch.float32),
            ((batch, height, width), torch.float32),
            ((batch,), torch.float32),
            ((batch, 2, pixels) if largest else (0,), torch.int32),
        ]
    )
    view = plan.view(features)

    def run(config: dict[str, int]) -> None:
        splits = view.splits(config)
        # Without a lag the first launch finds all masks, and the second one pools all images.
        lag = plan.lag(view, config, features.device) if pool else None
        lag = min(lag or batch, batch)
        partial = features.new_empty(batch, splits, view.fold, pixels, dtype=torch.float32)
        counts = features.new_zeros(1 + batch, dtype=torch.int32)
        queue = features.new_empty((batch - lag) * splits, dtype=torch.int32)
        constants = {"LAYOUT": view.layout, "FOLD": view.fold, **config}
        launch(
            _mask_kernel,
            (batch * splits,),
            *(features, partial, counts, queue, mask_BHW, area_B, *(companion or (mask_BHW, area_B)), labels_B2S),
            *(pooled_BC, theta, lag, features.stride(0)),
            LARGEST=largest,
            COMPANION=companion is not None,
            **constants,
        )
        if pool:
            arguments = (features, counts, queue, mask_BHW, area_B, pooled_BC, batch - lag, features.stride(0))
            launch(_pool_kernel, (lag * splits,), *arguments, **constants)

    key = ("masked_pool", features.dtype, triton.next_power_of_2(batch), view.layout)
    choose((*key, largest, pool), plan.forward_configurations(view, features.device), run)
    return pooled_BC, mask_BHW, area_B


def backward(
    grad_pooled_BC: Tensor, mask_BHW: Tensor, area_B: Tensor, theta: float, dtype: torch.dtype, order: Sequence[int]
) -> Tensor:
    """Gradient of the features [B, C, H, W], stored with the dimensions in ``order``, the slowest first."""
    (batch, channels), (_, height, width) = grad_pooled_BC.shape, mask_BHW.shape
    grad_BCHW = torch.empty_permuted(
        (batch, channels, height, width), tuple(order), dtype=dtype, device=mask_BHW.device
    )
    grad_pooled_BC, pixels = grad_pooled_BC.contiguous(), height * width
    view = plan.view(grad_BCHW)._replace(fold=1)

    def run(config: dict[str, int]) -> None:
        tiles = triton.cdiv(channels, config["BC"]) * triton.cdiv(pixels, config["BP"])
        launch(
            _backward_kernel,
            (batch * tiles,),
            *(grad_pooled_BC, mask_BHW, area_B, grad_BCHW, grad_BCHW.stride(0)),
            LAYOUT=view.layout,
            **config,
        )

    key = ("masked_pool_backward", dtype, triton.next_power_of_2(batch), view.layout)
    choose(key, plan.configurations(view), run)
    return grad_BCHW
