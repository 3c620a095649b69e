"""Pairs of images with many classes: the products with G and with the classes' gradients fill the matrix units, in
float16 or in three products of TF32. docs/kernels.md has the plan of the kernels. Legend: pairs/problem.py.

Grids count others in tiles of BJ, hidden units in tiles of BD, classes in tiles of BL, at least 16 of each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fpcn_kernels._launch import launch
from fpcn_kernels.pairs.block_triton import Block, Config
from fpcn_kernels.pairs.tiles_triton import (
    activation,
    active,
    add_product_where_active,
    dropout,
    half_activation,
    keeps,
    kept_scale,
    load_row,
    load_rows,
    store_or_add,
)


@triton.jit
def scores_kernel(
    own,
    own_stride,
    others_rows,
    others_stride,
    G,
    unscale,
    g,
    own_words,
    others_words,
    unit_words,
    scores,
    pitch,
    others,
    D: tl.constexpr,
    L: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    PTX: tl.constexpr,
    HALF: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    """scores[i, k, j] = G_ik . hidden_ij + g_ik."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    k = tl.program_id(1) * BL + tl.arange(0, BL)
    i = tl.program_id(2)
    score_JL = tl.zeros([BJ, BL], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        own_1D = load_row(own + i * own_stride, d, D, BD)
        others_JD = load_rows(others_rows, others_stride, j, d, others, D)
        hidden_JD = half_activation(own_1D, others_JD, RELU, PTX) if HALF else activation(own_1D, others_JD, RELU)
        if DROPPED > 0:
            kept_JD = keeps(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
            hidden_JD = tl.where(kept_JD, hidden_JD, 0.0)
        G_DL = tl.load(G + (i * L + k[None, :]) * D + d[:, None], mask=(k < L)[None, :] & (d < D)[:, None], other=0.0)
        score_JL = tl.dot(hidden_JD, G_DL, score_JL, input_precision="tf32x3")
    score_JL *= kept_scale(DROPPED)
    if HALF:
        score_JL *= tl.load(unscale) * tl.load(unscale + 1)
    score_JL += tl.load(g + i * L + k, mask=k < L, other=0.0)[None, :]
    mask = (j < others)[:, None] & (k < L)[None, :]
    tl.store(scores + (i * L + k[None, :]) * pitch + j[:, None], score_JL, mask=mask)


def _class_tile(block: Block, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(block.classes)))


def scores(block: Block, scores_ILJ: Tensor) -> None:
    """Write the block's scores."""
    # Three products keep each operand in two parts: twice the registers of a tile.
    warps = 4 if block.is_half else 8
    table = [
        {"BJ": 64, "BD": 32, "BL": _class_tile(block, 128), "num_warps": warps, "num_stages": 3},
        {"BJ": 64, "BD": 32, "BL": _class_tile(block, 64), "num_warps": 4, "num_stages": 3},
        {"BJ": 128, "BD": 32, "BL": _class_tile(block, 128), "num_warps": 8, "num_stages": 3},
    ]

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.others, config["BJ"]), triton.cdiv(block.classes, config["BL"]), block.count)
        arguments = (*block.operands, block.g_IL, *block.words, scores_ILJ, scores_ILJ.stride(1), block.others)
        launch(scores_kernel, grid, *arguments, HALF=block.is_half, **block.constants, **config)

    block.choose("scores", table, run)


@triton.jit
def own_kernel(
    own,
    own_stride,
    others_rows,
    others_stride,
    G,
    unscale,
    own_words,
    others_words,
    unit_words,
    class_grad,
    pitch,
    grad_own,
    grad_G,
    images,
    others,
    D: tl.constexpr,
    L: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    PTX: tl.constexpr,
    HALF: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    """grad_G[i, k] = sum_j q_ijk hidden_ij, and for each tile t of classes, as q does not depend on the unit,
    grad_own[t, i] = sum_j (sum_k q_ijk G_ik) * slope_ij = sum_k G_ik * (sum_j q_ijk slope_ij)."""
    i = tl.program_id(2)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    k = tl.program_id(1) * BL + tl.arange(0, BL)
    own_1D = load_row(own + i * own_stride, d, D, BD)
    sum_hidden_LD = tl.zeros([BL, BD], tl.float32)
    sum_slope_LD = tl.zeros([BL, BD], tl.float32)
    for start in range(0, others, BJ):
        j = start + tl.arange(0, BJ)
        others_JD = load_rows(others_rows, others_stride, j, d, others, D)
        hidden_JD = half_activation(own_1D, others_JD, RELU, PTX) if HALF else activation(own_1D, others_JD, RELU)
        slope_JD = active(hidden_JD, PTX and HALF) if RELU else tl.full([BJ, BD], 1.0, hidden_JD.dtype)
        if DROPPED > 0:
            kept_JD = keeps(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
            hidden_JD = tl.where(kept_JD, hidden_JD, 0.0)
            slope_JD = tl.where(kept_JD, slope_JD, 0.0)
        offsets = (i * L + k[:, None]) * pitch + j[None, :]
        q_LJ = tl.load(class_grad + offsets, mask=(k < L)[:, None] & (j < others)[None, :], other=0.0)
        q_LJ = q_LJ.to(hidden_JD.dtype)
        sum_hidden_LD = tl.dot(q_LJ, hidden_JD, sum_hidden_LD, input_precision="tf32x3")
        sum_slope_LD = tl.dot(q_LJ, slope_JD, sum_slope_LD, input_precision="tf32x3")
    mask = (k < L)[:, None] & (d < D)[None, :]
    offsets = (i * L + k[:, None]) * D + d[None, :]
    G_LD = tl.load(G + offsets, mask=mask, other=0.0).to(tl.float32)
    grad_own_D = tl.sum(G_LD * sum_slope_LD, 0) * kept_scale(DROPPED)
    sum_hidden_LD *= kept_scale(DROPPED)
    if HALF:
        sum_hidden_LD *= tl.load(unscale)
        grad_own_D *= tl.load(unscale + 1)
    tl.store(grad_G + offsets, sum_hidden_LD, mask=mask)
    tl.store(grad_own + (tl.program_id(1) * images + i) * D + d, grad_own_D, mask=d < D)


def own_gradients(block: Block, q_ILJ: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of own images [T, I, D], in tiles T of their sum over the classes, and of G [1, I, L, D]."""
    class_tile, size = _class_tile(block, 64), 2 if block.is_half else 1
    table = [
        {"BJ": 32 * size, "BD": 32 * size, "BL": class_tile, "num_warps": 4 * size, "num_stages": 2},
        {"BJ": 32, "BD": 128, "BL": class_tile, "num_warps": 8, "num_stages": 2},
    ]
    class_tiles = triton.cdiv(block.classes, class_tile)
    grad_own = q_ILJ.new_empty(class_tiles, block.count, block.width)
    grad_G = q_ILJ.new_empty(1, *block.G_ILD.shape)

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.width, config["BD"]), class_tiles, block.count)
        sums = grad_own, grad_G, block.count, block.others
        arguments = (*block.operands, *block.words, q_ILJ, q_ILJ.stride(1), *sums)
        launch(own_kernel, grid, *arguments, HALF=block.is_half, **block.constants, **config)

    block.choose("own", table, run)
    return grad_own, grad_G


@triton.jit
def others_kernel(
    own,
    own_stride,
    others_rows,
    others_stride,
    G,
    unscale,
    own_words,
    others_words,
    unit_words,
    class_grad,
    pitch,
    grad_others,
    grad_stride,
    scale,
    images,
    others,
    share,
    D: tl.constexpr,
    L: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    PTX: tl.constexpr,
    HALF: tl.constexpr,
    ADDED: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    """grad_others[s, j] = sum over share s of the images of (sum_k q_ijk G_ik) * slope_ij; the slopes are float32's."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    others_JD = load_rows(others_rows, others_stride, j, d, others, D)
    sum_JD = tl.zeros([BJ, BD], tl.float32)
    first = tl.program_id(2) * share
    for i in range(first, tl.minimum(first + share, images)):
        grad_JD = tl.zeros([BJ, BD], tl.float32)
        for start in range(0, L, BL):
            k = start + tl.arange(0, BL)
            q_offsets = (i * L + k[None, :]) * pitch + j[:, None]
            q_JL = tl.load(class_grad + q_offsets, mask=(k < L)[None, :], other=0.0)
            G_offsets = (i * L + k[:, None]) * D + d[None, :]
            G_LD = tl.load(G + G_offsets, mask=(k < L)[:, None] & (d < D)[None, :], other=0.0)
            grad_JD = tl.dot(q_JL.to(G_LD.dtype), G_LD, grad_JD, input_precision="tf32x3")
        if DROPPED > 0:
            grad_JD *= dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
        own_1D = load_row(own + i * own_stride, d, D, BD)
        sum_JD = add_product_where_active(own_1D, others_JD, 1.0, grad_JD, sum_JD, RELU, PTX)
    if HALF:
        sum_JD *= tl.load(unscale + 1)
    store_or_add(grad_others, grad_stride, scale, sum_JD, j, d, others, D, ADDED)


def add_others_gradients(block: Block, q_ILJ: Tensor, total_JD: Tensor) -> None:
    """Add the gradients of the others to ``total_JD``."""
    side, warps = (32, 4) if block.has_dropout else (64, 8)  # the hashes of dropout take registers
    table = [
        {"BJ": side, "BD": side, "BL": 16, "num_warps": warps, "num_stages": 3},
        {"BJ": 64, "BD": 64, "BL": _class_tile(block, 32), "num_warps": 8, "num_stages": 2},
        {"BJ": 64, "BD": 128, "BL": 16, "num_warps": 8, "num_stages": 3},
    ]
    block.add_others_gradients(others_kernel, table, block.factors, q_ILJ, total_JD, HALF=block.is_half)
