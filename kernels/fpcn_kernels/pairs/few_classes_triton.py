"""Pairs of images with few classes: every product is a fused multiply-add, as a matrix unit would mostly multiply
padding. docs/kernels.md has the plan of the kernels. Legend: pairs/problem.py.

A program is one warp, whose lanes divide the units of a row: every tensor then has one layout, and nothing waits for
other warps. Grids count images in groups of BI, others in tiles of BJ, hidden units in tiles of BD; loops over classes
are unrolled.
"""

from __future__ import annotations

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
    images,
    others,
    D: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
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
            hidden_JD = activation(own_1D, others_JD[start // BD], RELU)
            if DROPPED > 0:
                hidden_JD *= dropout(own_words, others_words, unit_words, i, j, start + d, others, D, DROPPED)
            new_products = ()
            for k in tl.static_range(K):
                product_JD = hidden_JD * load_row(G + (i * K + k) * D, start + d, D, BD)
                new_products = new_products + (product_JD if start == 0 else products[k] + product_JD,)
            products = new_products
        for k in tl.static_range(K):
            score_J = tl.sum(products[k], 1) + tl.load(g + i * K + k)
            tl.store(scores + (i * K + k) * others + j, score_J, mask=j < others)


def extra_constants() -> dict[str, str]:
    """The kernels of few classes have no constants of their own."""
    return {}


def scores(block: Block, scores_IKJ: Tensor) -> None:
    """Write the block's scores."""
    # Others and products take D / 32 + 4 K registers of a thread for each row of a tile.
    rows = 4 if block.width // 32 + 4 * block.classes <= 32 else 1 if block.width > 1024 else 2
    table = [
        {"BI": 16, "BJ": rows, "BD": 128, "num_warps": 1},
        {"BI": 32, "BJ": rows, "BD": 128, "num_warps": 1},
        {"BI": 16, "BJ": max(1, rows // 2), "BD": 128, "num_warps": 1},
    ]

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.others, config["BJ"]), triton.cdiv(block.count, config["BI"]), 1)
        arguments = (*block.rows, block.G_IKD, block.g_IK, *block.words, scores_IKJ, block.count, block.others)
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
    share,
    D: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    BI: tl.constexpr,
    BD: tl.constexpr,
):
    """Sums over share s of the others, for BI images that share each row of them:
    grad_G[s, i, k] = sum_j q_ijk hidden_ij and grad_own[s, i] = sum_j (sum_k q_ijk G_ik) * slope_ij."""
    first = tl.program_id(0) * BI
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    own_1D, G_1D, sum_own, sum_G = (), (), (), ()
    for m in tl.static_range(BI):
        i = tl.minimum(first + m, images - 1)
        own_1D = own_1D + (load_row(own + i * own_stride, d, D, BD),)
        sum_own = sum_own + (0.0 * own_1D[m],)
        for k in tl.static_range(K):
            G_1D = G_1D + (load_row(G + (i * K + k) * D, d, D, BD),)
            sum_G = sum_G + (0.0 * own_1D[m],)
    start = tl.program_id(2) * share
    for row in range(start, tl.minimum(start + share, others)):
        others_1D = load_row(others_rows + tl.cast(row, tl.int64) * others_stride, d, D, BD)
        new_own, new_G = (), ()
        for m in tl.static_range(BI):
            i = tl.minimum(first + m, images - 1)
            hidden_1D = activation(own_1D[m], others_1D, RELU)
            slope_1D = tl.where(hidden_1D > 0, 1.0, 0.0) if RELU else 1.0
            if DROPPED > 0:
                kept_1D = dropout(own_words, others_words, unit_words, i, row + tl.arange(0, 1), d, others, D, DROPPED)
                hidden_1D *= kept_1D
                slope_1D *= kept_1D
            for k in tl.static_range(K):
                q = tl.load(class_grad + (i * K + k) * others + row)
                new_G = new_G + (sum_G[m * K + k] + q * hidden_1D,)
                product_1D = q * G_1D[m * K + k]
                grad_1D = product_1D if k == 0 else grad_1D + product_1D  # noqa: F821
            new_own = new_own + (sum_own[m] + grad_1D * slope_1D,)
        sum_own, sum_G = new_own, new_G
    for m in tl.static_range(BI):
        i = first + m
        mask = ((d < D) & (i < images))[None, :]
        at = tl.program_id(2) * images + i
        tl.store(grad_own + at * D + d[None, :], sum_own[m], mask=mask)
        for k in tl.static_range(K):
            tl.store(grad_G + (at * K + k) * D + d[None, :], sum_G[m * K + k], mask=mask)


def own_gradients(block: Block, q_IKJ: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of own images [S, I, D] and of G [S, I, K, D], in shares S of their sums over the others."""
    # Sums of sixteen rows in registers: the fewer classes, the more images share a row of the others.
    group = max(1, 16 // (block.classes + 1))
    table = [
        {"BI": group, "BD": 128, "num_warps": 1},
        {"BI": max(1, group // 2), "BD": 256, "num_warps": 1},
        {"BI": max(1, group // 2), "BD": 128, "num_warps": 1},
    ]
    share, shares = block.shares(block.others, triton.cdiv(block.count, group) * triton.cdiv(block.width, 128), 16)
    grad_own = q_IKJ.new_empty(shares, block.count, block.width)
    grad_G = q_IKJ.new_empty(shares, *block.G_IKD.shape)

    def run(config: Config) -> None:
        grid = (triton.cdiv(block.count, config["BI"]), triton.cdiv(block.width, config["BD"]), shares)
        arguments = (*block.rows, block.G_IKD, *block.words, q_IKJ, grad_own, grad_G, block.count, block.others, share)
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
        for k in tl.static_range(K):
            # Undefined beyond the others, where nothing is stored.
            q_J1 = tl.load(class_grad + (i * K + k) * others + j[:, None], mask=(j < others)[:, None])
            product_JD = q_J1 * load_row(G + (i * K + k) * D, d, D, BD)
            grad_JD = product_JD if k == 0 else grad_JD + product_JD  # noqa: F821
        if RELU:
            grad_JD = tl.where(own_1D + others_JD > 0, grad_JD, 0.0)
        if DROPPED > 0:
            grad_JD *= dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
        sum_JD += grad_JD
    offsets = (tl.program_id(2) * others + j).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(grad_others + offsets, sum_JD, mask=(j < others)[:, None] & (d < D)[None, :])


def others_gradients(block: Block, q_IKJ: Tensor) -> Tensor:
    """The gradients of the others [S, J, D], in shares S of their sum over the own images."""
    table = [
        {"BJ": 8, "BD": 128, "num_warps": 1},
        {"BJ": 4, "BD": 128, "num_warps": 1},
        {"BJ": 4, "BD": 256, "num_warps": 1},
    ]
    return block.others_gradients(others_kernel, table, q_IKJ)
