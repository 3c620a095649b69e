"""Pairs of images with many classes: the products with G and with the classes' gradients fill the matrix units.
docs/kernels.md has the plan of the kernels. Legend: pairs/problem.py.

Grids count others in tiles of BJ, hidden units in tiles of BD, classes in tiles of BK, at least 16 of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpcn_kernels._launch import launch
from fpcn_kernels.pairs.block_triton import Block, Config
from fpcn_kernels.pairs.hidden_triton import activation, dropout, load_row, load_rows


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
    others,
    D: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """scores[i, k, j] = G_ik . hidden_ij + g_ik."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    i = tl.program_id(2)
    score_JK = tl.zeros([BJ, BK], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        own_1D = load_row(own + i * own_stride, d, D, BD)
        hidden_JD = activation(own_1D, load_rows(others_rows, others_stride, j, d, others, D), RELU)
        if DROPPED > 0:
            hidden_JD *= dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
        G_DK = tl.load(G + (i * K + k[None, :]) * D + d[:, None], mask=(k < K)[None, :] & (d < D)[:, None], other=0.0)
        score_JK = tl.dot(hidden_JD, G_DK, score_JK, input_precision=PRECISION)
    score_JK += tl.load(g + i * K + k, mask=k < K, other=0.0)[None, :]
    mask = (j < others)[:, None] & (k < K)[None, :]
    tl.store(scores + (i * K + k[None, :]) * others + j[:, None], score_JK, mask=mask)


def extra_constants() -> dict[str, str]:
    """PRECISION of the products, as PyTorch is set to."""
    return {"PRECISION": "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"}


def _parts(block: Block) -> int:
    """In how many parts a product keeps each operand: three products keep two, twice the registers of a tile."""
    return 2 if block.constants["PRECISION"] == "tf32x3" else 1


def _class_tile(block: Block, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(block.classes)))


def scores(block: Block, scores_IKJ: Tensor) -> None:
    """Write the block's scores."""
    table = [
        {"BJ": 64, "BD": 32, "BK": _class_tile(block, 128), "num_warps": 4 * _parts(block), "num_stages": 3},
        {"BJ": 64, "BD": 32, "BK": _class_tile(block, 64), "num_warps": 4, "num_stages": 3},
        {"BJ": 128, "BD": 32, "BK": _class_tile(block, 128), "num_warps": 8, "num_stages": 3},
    ]

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.others, config["BJ"]), triton.cdiv(block.classes, config["BK"]), block.count)
        arguments = (*block.rows, block.G_IKD, block.g_IK, *block.words, scores_IKJ, block.others)
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
    grad_own,
    grad_G,
    images,
    others,
    D: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """grad_G[i, k] = sum_j q_ijk hidden_ij, and for each tile t of classes, as q does not depend on the unit,
    grad_own[t, i] = sum_j (sum_k q_ijk G_ik) * slope_ij = sum_k G_ik * (sum_j q_ijk slope_ij)."""
    i = tl.program_id(2)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    own_1D = load_row(own + i * own_stride, d, D, BD)
    sum_hidden_KD = tl.zeros([BK, BD], tl.float32)
    sum_slope_KD = tl.zeros([BK, BD], tl.float32)
    for start in range(0, others, BJ):
        j = start + tl.arange(0, BJ)
        hidden_JD = activation(own_1D, load_rows(others_rows, others_stride, j, d, others, D), RELU)
        slope_JD = tl.where(hidden_JD > 0, 1.0, 0.0) if RELU else tl.full([BJ, BD], 1.0, tl.float32)
        if DROPPED > 0:
            kept_JD = dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
            hidden_JD *= kept_JD
            slope_JD *= kept_JD
        offsets = (i * K + k[:, None]) * others + j[None, :]
        q_KJ = tl.load(class_grad + offsets, mask=(k < K)[:, None] & (j < others)[None, :], other=0.0)
        sum_hidden_KD = tl.dot(q_KJ, hidden_JD, sum_hidden_KD, input_precision=PRECISION)
        sum_slope_KD = tl.dot(q_KJ, slope_JD, sum_slope_KD, input_precision=PRECISION)
    mask = (k < K)[:, None] & (d < D)[None, :]
    offsets = (i * K + k[:, None]) * D + d[None, :]
    tl.store(grad_G + offsets, sum_hidden_KD, mask=mask)
    G_KD = tl.load(G + offsets, mask=mask, other=0.0)
    tl.store(grad_own + (tl.program_id(1) * images + i) * D + d, tl.sum(G_KD * sum_slope_KD, 0), mask=d < D)


def own_gradients(block: Block, q_IKJ: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of own images [T, I, D], in tiles T of their sum over the classes, and of G [1, I, K, D]."""
    class_tile = _class_tile(block, 64)
    table = [
        {"BJ": 32, "BD": 64 // _parts(block), "BK": class_tile, "num_warps": 4, "num_stages": 2},
        {"BJ": 32, "BD": 128, "BK": class_tile, "num_warps": 8, "num_stages": 2},
    ]
    class_tiles = triton.cdiv(block.classes, class_tile)
    grad_own = q_IKJ.new_empty(class_tiles, block.count, block.width)
    grad_G = q_IKJ.new_empty(1, *block.G_IKD.shape)

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.width, config["BD"]), class_tiles, block.count)
        arguments = (*block.rows, block.G_IKD, *block.words, q_IKJ, grad_own, grad_G, block.count, block.others)
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
    grad_others,
    images,
    others,
    share,
    D: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """grad_others[s, j] = sum over share s of the images of (sum_k q_ijk G_ik) * slope_ij."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    others_JD = load_rows(others_rows, others_stride, j, d, others, D)
    sum_JD = tl.zeros([BJ, BD], tl.float32)
    first = tl.program_id(2) * share
    for i in range(first, tl.minimum(first + share, images)):
        grad_JD = tl.zeros([BJ, BD], tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            q_offsets = (i * K + k[None, :]) * others + j[:, None]
            q_JK = tl.load(class_grad + q_offsets, mask=(k < K)[None, :] & (j < others)[:, None], other=0.0)
            G_offsets = (i * K + k[:, None]) * D + d[None, :]
            G_KD = tl.load(G + G_offsets, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
            grad_JD = tl.dot(q_JK, G_KD, grad_JD, input_precision=PRECISION)
        if RELU:
            own_1D = load_row(own + i * own_stride, d, D, BD)
            grad_JD = tl.where(own_1D + others_JD > 0, grad_JD, 0.0)
        if DROPPED > 0:
            grad_JD *= dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
        sum_JD += grad_JD
    offsets = (tl.program_id(2) * others + j).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(grad_others + offsets, sum_JD, mask=(j < others)[:, None] & (d < D)[None, :])


def others_gradients(block: Block, q_IKJ: Tensor) -> Tensor:
    """The gradients of the others [S, J, D], in shares S of their sum over the own images."""
    table = [
        {"BJ": 64, "BD": 64, "BK": 16, "num_warps": 4, "num_stages": 3},
        {"BJ": 64, "BD": 64, "BK": _class_tile(block, 32), "num_warps": 8, "num_stages": 2},
        {"BJ": 64, "BD": 128, "BK": 16, "num_warps": 8, "num_stages": 3},
    ]
    return block.others_gradients(others_kernel, table, q_IKJ)
