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

from fpcn_kernels._launch import choose, launch, multiprocessors

# Added to an image's count of helpers once its mask is there; above any number of helpers.
_READY = tl.constexpr(1 << 24)
# A program's features, all of them in flight at once.
_TILE_BYTES = 2**15
# Warps of a multiprocessor that start between an image's sums and its pooling: as many as run at once, with the 96
# registers that the kernel takes, and a quarter more, for the mask to be there in time.
_LAG_WARPS = 25


# What differs between batches only must not compile anew.
@triton.jit(do_not_specialize=["images", "lag"])
def _mask_kernel(
    features,
    partial,
    arrived,
    helpers,
    mask,
    area,
    companion_mask,
    companion_area,
    labels,
    pooled,
    theta,
    images,
    lag,
    stride_b,
    LAYOUT: tl.constexpr,
    LARGEST: tl.constexpr,
    COMPANION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """A program sums some channels of image b; the last one of an image finds its mask. Then it pools some channels of
    image b - lag: what comes too early for the mask is left to the program that finds it."""
    C: tl.constexpr = LAYOUT[0]
    S: tl.constexpr = LAYOUT[1]
    splits: tl.constexpr = (C + BC - 1) // BC
    b = (tl.program_id(0) // splits).to(tl.int64)
    _sum_channels(features + b * stride_b, partial + b * splits * S, tl.program_id(0) % splits, LAYOUT, BP, BC)
    # Every thread's sums are stored before one thread says so.
    tl.debug_barrier()
    if tl.atomic_add(arrived + b, 1, sem="acq_rel") == splits - 1:
        companion = (companion_mask + b * S, companion_area + b)
        scratch = labels + b * 2 * S
        _find_mask(
            partial + b * splits * S,
            mask + b * S,
            area + b,
            companion,
            scratch,
            theta,
            splits,
            LAYOUT,
            LARGEST,
            COMPANION,
        )
        if b + lag < images:
            tl.debug_barrier()
            too_early = tl.atomic_add(helpers + b, _READY, sem="acq_rel")
            for split in range(0, too_early):
                _pool_channels(features + b * stride_b, mask + b * S, area + b, pooled + b * C, split, LAYOUT, BP, BC)
    if b >= lag:
        b -= lag
        turn = tl.atomic_add(helpers + b, 1, sem="acq_rel")
        if turn >= _READY:
            split = turn - _READY
            _pool_channels(features + b * stride_b, mask + b * S, area + b, pooled + b * C, split, LAYOUT, BP, BC)


@triton.jit(do_not_specialize=["first"])
def _pool_kernel(
    features, mask, area, pooled, first, stride_b, LAYOUT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """A program pools some channels of one of the images from the first on."""
    C: tl.constexpr = LAYOUT[0]
    S: tl.constexpr = LAYOUT[1]
    splits: tl.constexpr = (C + BC - 1) // BC
    b = first + (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    _pool_channels(features + b * stride_b, mask + b * S, area + b, pooled + b * C, split, LAYOUT, BP, BC)


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
    tl.store(grad + b * stride_b + _offsets(p, c, LAYOUT), grad_PC, mask=(p < S)[:, None] & (c < C)[None, :])


@triton.jit
def _sum_channels(features, partial, split, LAYOUT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """partial[split] = sums over the split's channels, in the same order for every pixel, in float32."""
    C: tl.constexpr = LAYOUT[0]
    S: tl.constexpr = LAYOUT[1]
    c = split * BC + tl.arange(0, BC)
    for first in range(0, S, BP):
        p = first + tl.arange(0, BP)
        within = (p < S)[:, None] & (c < C)[None, :]
        # They are read once more: let other lines leave the cache first.
        feat_PC = tl.load(features + _offsets(p, c, LAYOUT), mask=within, other=0.0, eviction_policy="evict_last")
        tl.store(partial + split * S + p, tl.sum(feat_PC.to(tl.float32), 1), mask=p < S)


@triton.jit
def _pool_channels(features, mask, area, pooled, split, LAYOUT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """pooled[c] = sum_p alpha / S * M[p] * F[c, p] for the split's channels."""
    C: tl.constexpr = LAYOUT[0]
    S: tl.constexpr = LAYOUT[1]
    c = split * BC + tl.arange(0, BC)
    scale = _over(tl.load(area), S)
    pooled_C = tl.zeros([BC], tl.float32)
    for first in range(0, S, BP):
        p = first + tl.arange(0, BP)
        weight_P = scale * tl.load(mask + p, mask=p < S, other=0.0)
        within = (p < S)[:, None] & (c < C)[None, :]
        # Nobody reads them again: these lines may leave the cache first.
        feat_PC = tl.load(features + _offsets(p, c, LAYOUT), mask=within, other=0.0, eviction_policy="evict_first")
        pooled_C += tl.sum(weight_P[:, None] * feat_PC.to(tl.float32), 0)
    tl.store(pooled + c, pooled_C, mask=c < C)


@triton.jit
def _find_mask(
    partial,
    mask,
    area,
    companion,
    labels,
    theta,
    splits: tl.constexpr,
    LAYOUT: tl.constexpr,
    LARGEST: tl.constexpr,
    COMPANION: tl.constexpr,
):
    """Equations 1 to 4 for one image."""
    S: tl.constexpr = LAYOUT[1]
    SP: tl.constexpr = triton.next_power_of_2(S)
    R: tl.constexpr = min(triton.next_power_of_2(splits), max(1, 4096 // SP))
    p = tl.arange(0, SP)
    sum_RP = tl.zeros([R, SP], tl.float32)
    for first in range(0, splits, R):
        r = first + tl.arange(0, R)
        sum_RP += tl.load(
            partial + (r * S)[:, None] + p[None, :], mask=(r < splits)[:, None] & (p < S)[None, :], other=0.0
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
def _offsets(p, c, LAYOUT: tl.constexpr):
    """Where pixels p and channels c of an image lie, [P, C]."""
    W: tl.constexpr = LAYOUT[2]
    stride_h: tl.constexpr = LAYOUT[4]
    stride_w: tl.constexpr = LAYOUT[5]
    pixel_P = p * stride_w if stride_h == W * stride_w else p // W * stride_h + p % W * stride_w
    return pixel_P[:, None] + (c * LAYOUT[3])[None, :]


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
    layout = _layout(features)

    def run(config: dict[str, int]) -> None:
        splits = triton.cdiv(channels, config["BC"])
        lag = min(_lag(features.device, splits, config["num_warps"]), batch) if pool else batch
        partial = features.new_empty(batch, splits, pixels, dtype=torch.float32)
        counts_2B = features.new_zeros(2, batch, dtype=torch.int32)
        launch(
            _mask_kernel,
            (batch * splits,),
            *(features, partial, *counts_2B, mask_BHW, area_B, *(companion or (mask_BHW, area_B)), labels_B2S),
            *(pooled_BC, theta, batch, lag, features.stride(0)),
            LAYOUT=layout,
            LARGEST=largest,
            COMPANION=companion is not None,
            **config,
        )
        if pool:
            arguments = (features, mask_BHW, area_B, pooled_BC, batch - lag, features.stride(0))
            launch(_pool_kernel, (lag * splits,), *arguments, LAYOUT=layout, **config)

    key = ("masked_pool", features.dtype, triton.next_power_of_2(batch), layout)
    choose((*key, largest, pool), _configurations(features), run)
    return pooled_BC, mask_BHW, area_B


def _lag(device: torch.device, splits: int, warps: int) -> int:
    """How many images later an image is pooled."""
    return triton.cdiv(multiprocessors(device) * _LAG_WARPS // warps, splits)


def backward(
    grad_pooled_BC: Tensor, mask_BHW: Tensor, area_B: Tensor, theta: float, dtype: torch.dtype, order: Sequence[int]
) -> Tensor:
    """Gradient of the features [B, C, H, W], stored with the dimensions in ``order``, the slowest first."""
    (batch, channels), (_, height, width) = grad_pooled_BC.shape, mask_BHW.shape
    grad_BCHW = torch.empty_permuted(
        (batch, channels, height, width), tuple(order), dtype=dtype, device=mask_BHW.device
    )
    grad_pooled_BC, pixels = grad_pooled_BC.contiguous(), height * width
    layout = _layout(grad_BCHW)

    def run(config: dict[str, int]) -> None:
        tiles = triton.cdiv(channels, config["BC"]) * triton.cdiv(pixels, config["BP"])
        launch(
            _backward_kernel,
            (batch * tiles,),
            *(grad_pooled_BC, mask_BHW, area_B, grad_BCHW, grad_BCHW.stride(0)),
            LAYOUT=layout,
            **config,
        )

    key = ("masked_pool_backward", dtype, triton.next_power_of_2(batch), layout)
    choose(key, _configurations(grad_BCHW), run)
    return grad_BCHW


def _layout(tensor: Tensor) -> tuple[int, ...]:
    """C, S, W and the strides of channels, rows and columns: constants, so that the compiler knows their alignment."""
    _, channels, height, width = tensor.shape
    return channels, height * width, width, *tensor.stride()[1:]


def _configurations(tensor: Tensor) -> list[dict[str, int]]:
    """Tiles of [BP pixels, BC channels] for a tensor's size and dtype, the known-good one first."""
    _, channels, height, width = tensor.shape
    pixels = triton.next_power_of_2(height * width)
    # One program finds the mask of a whole image, in registers.
    warps = max(4, pixels // 256)
    table = []
    for tile_bytes, rows, num_warps in [
        (_TILE_BYTES, 256, warps),
        (_TILE_BYTES, 256, 2 * warps),
        (_TILE_BYTES, 128, warps),
        (_TILE_BYTES // 2, 256, warps),
    ]:
        BP = min(rows, pixels)
        BC = min(tile_bytes // (BP * tensor.element_size()), triton.next_power_of_2(channels), 1024)
        table.append({"BP": BP, "BC": BC, "num_warps": num_warps})
    return table
