"""Pairs of images with many classes: the products with G and with the classes' gradients fill the matrix units.
docs/kernels.md has the plan of the kernels. Legend: pairs/problem.py.

Grids count others in tiles of BJ, hidden units in tiles of BD, classes in tiles of BL, at least 16 of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpcn_kernels._launch import launch
from fpcn_kernels.pairs.block_triton import Block, Config
from fpcn_kernels.pairs.hidden_triton import activation, dropout, load_row, load_rows, store_or_add


@triton.jit
def scores_kernel(
    own,
    own_stride,
    others_rows,
    others_stride,
    G,
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
    PRECISION: tl.constexpr,
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
        hidden_JD = activation(own_1D, load_rows(others_rows, others_stride, j, d, others, D), RELU)
        if DROPPED > 0:
            hidden_JD *= dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
        G_DL = tl.load(G + (i * L + k[None, :]) * D + d[:, None], mask=(k < L)[None, :] & (d < D)[:, None], other=0.0)
        score_JL = tl.dot(hidden_JD, G_DL, score_JL, input_precision=PRECISION)
    score_JL += tl.load(g + i * L + k, mask=k < L, other=0.0)[None, :]
    mask = (j < others)[:, None] & (k < L)[None, :]
    tl.store(scores + (i * L + k[None, :]) * pitch + j[:, None], score_JL, mask=mask)


def extra_constants() -> dict[str, str | bool]:
    """PRECISION of the products, as PyTorch is set to."""
    return {"PRECISION": "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"}


def _parts(block: Block) -> int:
    """In how many parts a product keeps each operand: three products keep two, twice the registers of a tile."""
    return 2 if block.constants["PRECISION"] == "tf32x3" else 1


def _class_tile(block: Block, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(block.classes)))


def scores(block: Block, scores_ILJ: Tensor) -> None:
    """Write the block's scores."""
    table = [
        {"BJ": 64, "BD": 32, "BL": _class_tile(block, 128), "num_warps": 4 * _parts(block), "num_stages": 3},
        {"BJ": 64, "BD": 32, "BL": _class_tile(block, 64), "num_warps": 4, "num_stages": 3},
        {"BJ": 128, "BD": 32, "BL": _class_tile(block, 128), "num_warps": 8, "num_stages": 3},
    ]

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.others, config["BJ"]), triton.cdiv(block.classes, config["BL"]), block.count)
        arguments = (*block.rows, block.G_ILD, block.g_IL, *block.words, scores_ILJ, scores_ILJ.stride(1), block.others)
        launch(scores_kernel, grid, *arguments, **block.constants, **config)

    block.choose("scores", table, run)


@triton.jit
def own_kernel(
    own,
    own_stride,
    others_rows,
    others_stride,
    G,
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
    PRECISION: tl.constexpr,
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
        hidden_JD = activation(own_1D, load_rows(others_rows, others_stride, j, d, others, D), RELU)
        slope_JD = tl.where(hidden_JD > 0, 1.0, 0.0) if RELU else tl.full([BJ, BD], 1.0, tl.float32)
        if DROPPED > 0:
            kept_JD = dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
            hidden_JD *= kept_JD
            slope_JD *= kept_JD
        offsets = (i * L + k[:, None]) * pitch + j[None, :]
        q_LJ = tl.load(class_grad + offsets, mask=(k < L)[:, None] & (j < others)[None, :], other=0.0)
        sum_hidden_LD = tl.dot(q_LJ, hidden_JD, sum_hidden_LD, input_precision=PRECISION)
        sum_slope_LD = tl.dot(q_LJ, slope_JD, sum_slope_LD, input_precision=PRECISION)
    mask = (k < L)[:, None] & (d < D)[None, :]
    offsets = (i * L + k[:, None]) * D + d[None, :]
    tl.store(grad_G + offsets, sum_hidden_LD, mask=mask)
    G_LD = tl.load(G + offsets, mask=mask, other=0.0)
    tl.store(grad_own + (tl.program_id(1) * images + i) * D + d, tl.sum(G_LD * sum_slope_LD, 0), mask=d < D)


def own_gradients(block: Block, q_ILJ: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of own images [T, I, D], in tiles T of their sum over the classes, and of G [1, I, L, D]."""
    class_tile = _class_tile(block, 64)
    table = [
        {"BJ": 32, "BD": 64 // _parts(block), "BL": class_tile, "num_warps": 4, "num_stages": 2},
        {"BJ": 32, "BD": 128, "BL": class_tile, "num_warps": 8, "num_stages": 2},
    ]
    class_tiles = triton.cdiv(block.classes, class_tile)
    grad_own = q_ILJ.new_empty(class_tiles, block.count, block.width)
    grad_G = q_ILJ.new_empty(1, *block.G_ILD.shape)

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.width, config["BD"]), class_tiles, block.count)
        arguments = (
            *block.rows,
            block.G_ILD,
            *block.words,
            q_ILJ,
            q_ILJ.stride(1),
            grad_own,
            grad_G,
            block.count,
            block.others,
        )
        launch(own_kernel, grid, *arguments, **block.constants, **config)

    block.choose("own", table, run)
    return grad_own, grad_G


@triton.jit
def others_kernel(
    own,
    own_stride,
    others_rows,
    others_stride,
    G,
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
    PRECISION: tl.constexpr,
    ADDED: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    """grad_others[s, j] = sum over share s of the images of (sum_k q_ijk G_ik) * slope_ij."""
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
            q_JL = tl.load(class_grad + q_offsets, mask=(k < L)[None, :] & (j < others)[:, None], other=0.0)
            G_offsets = (i * L + k[:, None]) * D + d[None, :]
            G_LD = tl.load(G + G_offsets, mask=(k < L)[:, None] & (d < D)[None, :], other=0.0)
            grad_JD = tl.dot(q_JL, G_LD, grad_JD, input_precision=PRECISION)
        if RELU:
            own_1D = load_row(own + i * own_stride, d, D, BD)
            grad_JD = tl.where(own_1D + others_JD > 0, grad_JD, 0.0)
        if DROPPED > 0:
            grad_JD *= dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
        sum_JD += grad_JD
    store_or_add(grad_others, grad_stride, scale, sum_JD, j, d, others, D, ADDED)


def add_others_gradients(block: Block, q_ILJ: Tensor, total_JD: Tensor) -> None:
    """Add the gradients of the others to ``total_JD``."""
    table = [
        {"BJ": 64, "BD": 64, "BL": 16, "num_warps": 4, "num_stages": 3},
        {"BJ": 64, "BD": 64, "BL": _class_tile(block, 32), "num_warps": 8, "num_stages": 2},
        {"BJ": 64, "BD": 128, "BL": 16, "num_warps": 8, "num_stages": 3},
    ]
    block.add_others_gradients(others_kernel, table, q_ILJ, total_JD)
