"""Pairs of images with few classes in float16: the products with G and with q fill matrix units, whose eight columns
hold all classes. docs/kernels.md has the plan of the kernels and their errors. Legend: pairs/problem.py.

A program is one warp: nothing waits for other warps, and the compiler takes the matrix instructions that every
supported GPU has. Hidden vectors are a matrix unit's first operand, which they reach in registers: own images pass by
while the others stay. The gradients of the others are computed as those of many classes. Grids count images in groups
of BI, others in tiles of BJ, hidden units in tiles of BD.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fpcn_kernels._launch import launch
from fpcn_kernels.pairs.block_triton import Block, Config
from fpcn_kernels.pairs.many_classes_triton import others_kernel
from fpcn_kernels.pairs.tiles_triton import active, half_activation, keeps, kept_scale, load_row, load_rows


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
    images,
    others,
    D: tl.constexpr,
    L: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    PTX: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
):
    """scores[i, k, j] = G_ik . hidden_ij + g_ik; a tile of whole others stays in registers for BI images."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    d = tl.arange(0, BD)
    k = tl.arange(0, 8)
    others_JD = ()
    for start in tl.static_range(0, D, BD):
        others_JD = others_JD + (load_rows(others_rows, others_stride, j, start + d, others, D),)
    factor = tl.load(unscale) * tl.load(unscale + 1) * kept_scale(DROPPED)
    mask = (k < L)[None, :] & (j < others)[:, None]
    first = tl.program_id(1) * BI
    for i in range(first, tl.minimum(first + BI, images)):
        score_JL = tl.zeros([BJ, 8], tl.float32)
        for start in tl.static_range(0, D, BD):
            hidden_JD = half_activation(
                load_row(own + i * own_stride, start + d, D, BD), others_JD[start // BD], RELU, PTX
            )
            if DROPPED > 0:
                kept_JD = keeps(own_words, others_words, unit_words, i, j, start + d, others, D, DROPPED)
                hidden_JD = tl.where(kept_JD, hidden_JD, 0.0)
            G_mask = (k < L)[None, :] & (start + d < D)[:, None]
            G_DL = tl.load(G + (i * L + k[None, :]) * D + start + d[:, None], mask=G_mask, other=0.0)
            score_JL = tl.dot(hidden_JD, G_DL, score_JL)
        score_JL = score_JL * factor + tl.load(g + i * L + k, mask=k < L, other=0.0)[None, :]
        tl.store(scores + (i * L + k[None, :]) * pitch + j[:, None], score_JL, mask=mask)


def scores(block: Block, scores_ILJ: Tensor) -> None:
    """Write the block's scores."""
    table = [
        {"BI": 16, "BJ": 16, "BD": 128, "num_warps": 1},
        {"BI": 32, "BJ": 16, "BD": 128, "num_warps": 1},
        {"BI": 32, "BJ": 32, "BD": 64, "num_warps": 2},
    ]

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.others, config["BJ"]), triton.cdiv(block.count, config["BI"]), 1)
        arguments = (*block.operands, block.g_IL, *block.words, scores_ILJ, scores_ILJ.stride(1))
        launch(scores_kernel, grid, *arguments, block.count, block.others, **block.constants, **config)

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
    share,
    D: tl.constexpr,
    L: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    PTX: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
):
    """Sums over share s of the others, for BI images that share each tile of them:
    grad_G[s, i, k] = sum_j q_ijk hidden_ij and grad_own[s, i] = sum_k G_ik * (sum_j q_ijk slope_ij)."""
    first = tl.program_id(0) * BI
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    k = tl.arange(0, 8)
    own_D1, sum_hidden, sum_slope = (), (), ()
    for m in tl.static_range(BI):
        i = tl.minimum(first + m, images - 1)
        own_D1 = own_D1 + (tl.load(own + i * own_stride + d[:, None], mask=(d < D)[:, None], other=0.0),)
        sum_hidden = sum_hidden + (tl.zeros([BD, 8], tl.float32),)
        sum_slope = sum_slope + (tl.zeros([BD, 8], tl.float32),)
    start = tl.program_id(2) * share
    end = tl.minimum(start + share, others)
    for row in range(start, end, BJ):
        j = row + tl.arange(0, BJ)
        inside = (j < end)[None, :]
        rows_DJ = others_rows + j.to(tl.int64)[None, :] * others_stride + d[:, None]
        others_DJ = tl.load(rows_DJ, mask=(d < D)[:, None] & inside, other=0.0)
        new_hidden, new_slope = (), ()
        for m in tl.static_range(BI):
            i = tl.minimum(first + m, images - 1)
            offsets = (i * L + k[None, :]) * pitch + j[:, None]
            q_JL = tl.load(class_grad + offsets, mask=(k < L)[None, :] & (j < end)[:, None], other=0.0).to(tl.float16)
            hidden_DJ = half_activation(own_D1[m], others_DJ, RELU, PTX)
            slope_DJ = active(hidden_DJ, PTX) if RELU else tl.full([BD, BJ], 1.0, tl.float16)
            if DROPPED > 0:
                kept_JD = keeps(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
                hidden_DJ = tl.where(tl.trans(kept_JD), hidden_DJ, 0.0)
                slope_DJ = tl.where(tl.trans(kept_JD), slope_DJ, 0.0)
            new_hidden = new_hidden + (tl.dot(hidden_DJ, q_JL, sum_hidden[m]),)
            new_slope = new_slope + (tl.dot(slope_DJ, q_JL, sum_slope[m]),)
        sum_hidden, sum_slope = new_hidden, new_slope
    for m in tl.static_range(BI):
        i = first + m
        at = tl.program_id(2) * images + i
        mask = ((d < D) & (i < images))[:, None] & (k < L)[None, :]
        G_DL = tl.load(G + (i * L + k[None, :]) * D + d[:, None], mask=mask, other=0.0).to(tl.float32)
        grad_G_DL = sum_hidden[m] * (tl.load(unscale) * kept_scale(DROPPED))
        tl.store(grad_G + (at * L + k[None, :]) * D + d[:, None], grad_G_DL, mask=mask)
        grad_own_D = tl.sum(G_DL * sum_slope[m], 1) * (tl.load(unscale + 1) * kept_scale(DROPPED))
        tl.store(grad_own + at * D + d, grad_own_D, mask=(d < D) & (i < images))


def own_gradients(block: Block, q_ILJ: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of own images [S, I, D] and of G [S, I, L, D], in shares S of their sums over the others."""
    group, rows = (1, 16) if block.has_dropout else (4, 32)  # the hashes of dropout take registers
    table = [
        {"BI": group, "BJ": rows, "BD": 64, "num_warps": 1},
        {"BI": max(1, group // 2), "BJ": 64, "BD": 64, "num_warps": 1},
        {"BI": group, "BJ": 64, "BD": 64, "num_warps": 2},
    ]
    share, shares = block.shares(block.others, triton.cdiv(block.count, group) * triton.cdiv(block.width, 64), 8)
    grad_own = q_ILJ.new_empty(shares, block.count, block.width)
    grad_G = q_ILJ.new_empty(shares, *block.G_ILD.shape)

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.count, config["BI"]), triton.cdiv(block.width, config["BD"]), shares)
        arguments = (*block.operands, *block.words, q_ILJ, q_ILJ.stride(1), grad_own, grad_G)
        launch(own_kernel, grid, *arguments, block.count, block.others, share, **block.constants, **config)

    block.choose("own", table, run)
    return grad_own, grad_G


def add_others_gradients(block: Block, q_ILJ: Tensor, total_JD: Tensor) -> None:
    """Add the gradients of the others to ``total_JD``."""
    table = [
        {"BJ": 16, "BD": 64, "BL": 16, "num_warps": 1, "num_stages": 2}
        if block.has_dropout
        else {"BJ": 32, "BD": 64, "BL": 16, "num_warps": 1},
        {"BJ": 32, "BD": 128, "BL": 16, "num_warps": 2},
        {"BJ": 64, "BD": 128, "BL": 16, "num_warps": 4},
    ]
    block.add_others_gradients(others_kernel, table, block.factors, q_ILJ, total_JD, HALF=True)
