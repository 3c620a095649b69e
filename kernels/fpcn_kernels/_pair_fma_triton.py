"""Pairs of images with few classes: every product is a fused multiply-add, as a matrix unit would mostly multiply
padding. docs/kernels.md has the plan of the kernels. Legend: _pair_problem.py.

Grids count images in groups of BI, others in tiles of BJ, hidden units in tiles of BD. Class loops are unrolled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fpcn_kernels._pair_hidden_triton import activation, dropout, load_rows


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
    """scores[i, k, j] = G_ik . hidden_ij + g_ik; a tile of others stays in registers (BD >= D) for BI images."""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    d = tl.arange(0, BD)
    others_JD = load_rows(others_rows, others_stride, j, d, others, D)
    first = tl.program_id(1) * BI
    for i in range(first, tl.minimum(first + BI, images)):
        hidden_JD = activation(tl.load(own + i * own_stride + d, mask=d < D, other=0.0), others_JD, RELU)
        if DROPPED > 0:
            hidden_JD *= dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
        for k in tl.static_range(K):
            G_D = tl.load(G + (i * K + k) * D + d, mask=d < D, other=0.0)
            score_J = tl.sum(hidden_JD * G_D[None, :], 1) + tl.load(g + i * K + k)
            tl.store(scores + (i * K + k) * others + j, score_J, mask=j < others)


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
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
):
    """Sums over the others for BI images at once, which share each tile of others:
    grad_G[i, k] = sum_j q_ijk hidden_ij and grad_own[i] = sum_j (sum_k q_ijk G_ik) * slope_ij.

    The sums keep the tile's rows apart until the end, so that no thread waits for another inside the loop.
    """
    first = tl.program_id(0) * BI
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    own_D, G_D, sum_own, sum_G = (), (), (), ()
    for m in tl.static_range(BI):
        i = tl.minimum(first + m, images - 1)
        own_D = own_D + (tl.load(own + i * own_stride + d, mask=d < D, other=0.0),)
        sum_own = sum_own + (tl.zeros([BJ, BD], tl.float32),)
        for k in tl.static_range(K):
            G_D = G_D + (tl.load(G + (i * K + k) * D + d, mask=d < D, other=0.0),)
            sum_G = sum_G + (tl.zeros([BJ, BD], tl.float32),)
    for start in range(0, others, BJ):
        j = start + tl.arange(0, BJ)
        others_JD = load_rows(others_rows, others_stride, j, d, others, D)
        new_own, new_G = (), ()
        for m in tl.static_range(BI):
            i = tl.minimum(first + m, images - 1)
            hidden_JD = activation(own_D[m], others_JD, RELU)
            slope_JD = tl.where(hidden_JD > 0, 1.0, 0.0) if RELU else 1.0
            if DROPPED > 0:
                kept_JD = dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
                hidden_JD *= kept_JD
                slope_JD *= kept_JD
            grad_JD = tl.zeros([BJ, BD], tl.float32)
            for k in tl.static_range(K):
                q_J = tl.load(class_grad + (i * K + k) * others + j, mask=j < others, other=0.0)
                new_G = new_G + (sum_G[m * K + k] + q_J[:, None] * hidden_JD,)
                grad_JD += q_J[:, None] * G_D[m * K + k][None, :]
            new_own = new_own + (sum_own[m] + grad_JD * slope_JD,)
        sum_own, sum_G = new_own, new_G
    for m in tl.static_range(BI):
        i = first + m
        mask = (d < D) & (i < images)
        tl.store(grad_own + i * D + d, tl.sum(sum_own[m], 0), mask=mask)
        for k in tl.static_range(K):
            tl.store(grad_G + (i * K + k) * D + d, tl.sum(sum_G[m * K + k], 0), mask=mask)


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
        own_D = tl.load(own + i * own_stride + d, mask=d < D, other=0.0)
        grad_JD = tl.zeros([BJ, BD], tl.float32)
        for k in tl.static_range(K):
            q_J = tl.load(class_grad + (i * K + k) * others + j, mask=j < others, other=0.0)
            G_D = tl.load(G + (i * K + k) * D + d, mask=d < D, other=0.0)
            grad_JD += q_J[:, None] * G_D[None, :]
        if RELU:
            grad_JD = tl.where(own_D[None, :] + others_JD > 0, grad_JD, 0.0)
        if DROPPED > 0:
            grad_JD *= dropout(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
        sum_JD += grad_JD
    offsets = (tl.program_id(2) * others + j).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(grad_others + offsets, sum_JD, mask=(j < others)[:, None] & (d < D)[None, :])
