"""Pairs of images with few classes in float32: every product is a fused multiply-add, as a matrix unit would mostly
multiply padding. docs/kernels.md has the plan of the kernels. Legend: pairs/problem.py.

A program is one warp, whose lanes divide the units of a row: every tensor then has one layout, and nothing waits for
other warps. Grids count images in groups of BI, others in tiles of BJ, hidden units in tiles of BD; loops over classes
are unrolled. Without dropout nothing adds u to v: relu(u + v) = max(v, -u) + u, and what the last term adds to a score
or a sum does not depend on the pair.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fpcn_kernels._launch import launch
from fpcn_kernels.pairs.block_triton import Block, Config
from fpcn_kernels.pairs.tiles_triton import (
    activation,
    add_product_where_active,
    add_where_active,
    dropout,
    load_row,
    load_rows,
    shifted,
    store_or_add,
)


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
    others_JD = ()
    for start in tl.static_range(0, D, BD):
        others_JD = others_JD + (load_rows(others_rows, others_stride, j, start + d, others, D),)
    first = tl.program_id(1) * BI
    for i in range(first, tl.minimum(first + BI, images)):
        products = ()
        for start in tl.static_range(0, D, BD):
            own_1D = load_row(own + i * own_stride, start + d, D, BD)
            if DROPPED > 0:
                hidden_JD = activation(own_1D, others_JD[start // BD], RELU)
                hidden_JD *= dropout(own_words, others_words, unit_words, i, j, start + d, others, D, DROPPED)
            else:
                hidden_JD = shifted(own_1D, others_JD[start // BD], RELU)
            new_products = ()
            for k in tl.static_range(L):
                product_JD = hidden_JD * load_row(G + (i * L + k) * D, start + d, D, BD)
                new_products = new_products + (product_JD if start == 0 else products[k] + product_JD,)
            products = new_products
        for k in tl.static_range(L):
            score_J = tl.sum(products[k], 1) + tl.load(g + i * L + k)
            tl.store(scores + (i * L + k) * pitch + j, score_J, mask=j < others)


def scores(block: Block, scores_ILJ: Tensor) -> None:
    """Write the block's scores."""
    # Others and products take D / 32 + 4 L registers of a thread for each row of a tile.
    rows = 4 if block.width // 32 + 4 * block.classes <= 32 else 1 if block.width > 1024 else 2
    table = [
        {"BI": 16, "BJ": rows, "BD": 128, "num_warps": 1},
        {"BI": 32, "BJ": rows, "BD": 128, "num_warps": 1},
        {"BI": 16, "BJ": max(1, rows // 2), "BD": 128, "num_warps": 1},
    ]

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.others, config["BJ"]), triton.cdiv(block.count, config["BI"]), 1)
        arguments = (
            *block.rows,
            block.G_ILD,
            block.shifted_g_IL,
            *block.words,
            scores_ILJ,
            scores_ILJ.stride(1),
            block.count,
            block.others,
        )
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
    share,
    D: tl.constexpr,
    L: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    PTX: tl.constexpr,
    BI: tl.constexpr,
    BD: tl.constexpr,
):
    """Sums over share s of the others, for BI images that share each row of them:
    grad_G[s, i, k] = sum_j q_ijk hidden_ij and grad_own[s, i] = sum_k G_ik * (sum_j q_ijk slope_ij)."""
    first = tl.program_id(0) * BI
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    own_1D, sum_hidden, sum_slope = (), (), ()
    for m in tl.static_range(BI):
        own_1D = own_1D + (load_row(own + tl.minimum(first + m, images - 1) * own_stride, d, D, BD),)
        for _ in tl.static_range(L):
            sum_hidden, sum_slope = sum_hidden + (0.0 * own_1D[m],), sum_slope + (0.0 * own_1D[m],)
    start = tl.program_id(2) * share
    for row in range(start, tl.minimum(start + share, others)):
        others_1D = load_row(others_rows + tl.cast(row, tl.int64) * others_stride, d, D, BD)
        new_hidden, new_slope = (), ()
        for m in tl.static_range(BI):
            i = tl.minimum(first + m, images - 1)
            if DROPPED > 0:
                hidden_1D = activation(own_1D[m], others_1D, RELU)
                kept_1D = dropout(own_words, others_words, unit_words, i, row + tl.arange(0, 1), d, others, D, DROPPED)
                slope_1D = tl.where(hidden_1D > 0, kept_1D, 0.0) if RELU else kept_1D
                hidden_1D *= kept_1D
            for k in tl.static_range(L):
                q = tl.load(class_grad + (i * L + k) * pitch + row)
                if DROPPED > 0:
                    one_hidden = sum_hidden[m * L + k] + q * hidden_1D
                    one_slope = sum_slope[m * L + k] + q * slope_1D
                else:
                    sums = sum_hidden[m * L + k], sum_slope[m * L + k]
                    one_hidden, one_slope = add_where_active(own_1D[m], others_1D, q, *sums, RELU, PTX)
                new_hidden, new_slope = new_hidden + (one_hidden,), new_slope + (one_slope,)
        sum_hidden, sum_slope = new_hidden, new_slope
    for m in tl.static_range(BI):
        i = first + m
        mask = ((d < D) & (i < images))[None, :]
        at = tl.program_id(2) * images + i
        grad_own_1D = 0.0 * own_1D[m]
        for k in tl.static_range(L):
            one_slope = sum_slope[m * L + k]
            grad_own_1D += one_slope * load_row(G + (tl.minimum(i, images - 1) * L + k) * D, d, D, BD)
            one_hidden = sum_hidden[m * L + k]
            if DROPPED == 0:
                one_hidden += own_1D[m] * one_slope
            tl.store(grad_G + (at * L + k) * D + d[None, :], one_hidden, mask=mask)
        tl.store(grad_own + at * D + d[None, :], grad_own_1D, mask=mask)


def own_gradients(block: Block, q_ILJ: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of own images [S, I, D] and of G [S, I, L, D], in shares S of their sums over the others."""
    # Sums of sixteen rows in registers: the fewer classes, the more images share a row of the others.
    group = max(1, 8 // block.classes)
    table = [
        {"BI": group, "BD": 128, "num_warps": 1},
        {"BI": max(1, group // 2), "BD": 256, "num_warps": 1},
        {"BI": max(1, group // 2), "BD": 128, "num_warps": 1},
    ]
    share, shares = block.shares(block.others, triton.cdiv(block.count, group) * triton.cdiv(block.width, 128), 16)
    grad_own = q_ILJ.new_empty(shares, block.count, block.width)
    grad_G = q_ILJ.new_empty(shares, *block.G_ILD.shape)

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.count, config["BI"]), triton.cdiv(block.width, config["BD"]), shares)
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
            share,
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
    PTX: tl.constexpr,
    ADDED: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
):
    """grad_others[s, j] = sum over share s of the images of (sum_k q_ijk G_ik) * slope_ij."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    others_JD = load_rows(others_rows, others_stride, j, d, others, D)
    sum_JD = tl.zeros([BJ, BD], tl.float32)
    first = tl.program_id(2) * share
    for i in range(first, tl.minimum(first + share, images)):
        own_1D = load_row(own + i * own_stride, d, D, BD)
        if DROPPED > 0:
            slope_JD = dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
            if RELU:
                slope_JD = tl.where(others_JD > -own_1D, slope_JD, 0.0)
        for k in tl.static_range(L):
            # Undefined beyond the others, where nothing is stored: rows are padded to whole tiles.
            q_J1 = tl.load(class_grad + (i * L + k) * pitch + j[:, None])
            G_1D = load_row(G + (i * L + k) * D, d, D, BD)
            if DROPPED > 0:
                sum_JD += q_J1 * G_1D * slope_JD
            else:
                sum_JD = add_product_where_active(own_1D, others_JD, q_J1, G_1D, sum_JD, RELU, PTX)
    store_or_add(grad_others, grad_stride, scale, sum_JD, j, d, others, D, ADDED)


def add_others_gradients(block: Block, q_ILJ: Tensor, total_JD: Tensor) -> None:
    """Add the gradients of the others to ``total_JD``."""
    table = [
        {"BJ": 8, "BD": 128, "num_warps": 1},
        {"BJ": 4, "BD": 128, "num_warps": 1},
        {"BJ": 4, "BD": 256, "num_warps": 1},
    ]
    block.add_others_gradients(others_kernel, table, (block.G_ILD,), q_ILJ, total_JD)
