"""Pairs of images with many classes: the products with G and with the classes' gradients fill the matrix units.
docs/kernels.md has the plan of the kernels. Legend: pairs/problem.py.

Grids count others in tiles of BJ, hidden units in tiles of BD, classes in tiles of BK, at least 16 of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
