"""One side of a block of pairs in fused kernels; docs/kernels.md has their plan. Legend: pairs/problem.py.

scores -> softmax, in place -> sums over the others, sums over the own images. Hidden vectors exist in registers only;
the scores of a piece of the block, later their gradients q, are all that is stored, [I, K, J] within a budget.
Every sum has one owner and a fixed order: no atomics, bitwise deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpcn_kernels._launch import launch
from fpcn_kernels.pairs import few_classes_triton, many_classes_triton
from fpcn_kernels.pairs.block_triton import Block
from fpcn_kernels.pairs.problem import Side, SideGradients, ranges
from fpcn_kernels.pairs.random import RandomPairs

# Scores that the second-level cache can hold beside what the kernels read.
_SCORES_BYTES = 2**25
# CUDA's bound on all but the first dimension of a grid.
_GRID_LIMIT = 65535
# Up to here multiply-adds beat matrix units, which would pad the classes to 16.
_FEW_CLASSES = 8


@triton.jit
def _softmax_kernel(
    scores,
    labels,
    shift,
    losses,
    own_first,
    others_first,
    others,
    total,
    count,
    K: tl.constexpr,
    OWN_IS_A: tl.constexpr,
    ROUNDS: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
):
    """The scores [I, K, J] become q = softmax - one-hot, 0 for pairs not chosen; losses are [I, tiles of J]."""
    i = tl.program_id(1)
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    k = tl.arange(0, BK)
    offsets = (i * K + k[:, None]) * others + j[None, :]
    mask = (k < K)[:, None] & (j < others)[None, :]
    score_KJ = tl.load(scores + offsets, mask=mask, other=0.0)
    score_KJ = tl.where((k < K)[:, None], score_KJ, -float("inf"))
    top_J = tl.max(score_KJ, 0)
    power_KJ = tl.exp(score_KJ - top_J[None, :])
    sum_J = tl.sum(power_KJ, 0)
    is_label_K1 = (k == tl.load(labels + i))[:, None]
    loss_J = tl.log(sum_J) + top_J - tl.sum(tl.where(is_label_K1, score_KJ, 0.0), 0)
    q_KJ = power_KJ / sum_J[None, :] - tl.where(is_label_K1, 1.0, 0.0)
    if ROUNDS > 0:
        # RandomPairs.contain: the keyed permutation run backwards.
        own_J, others_J = (own_first + i) + 0 * j, tl.minimum(others_first + j, total - 1)
        a, b = (own_J, others_J) if OWN_IS_A else (others_J, own_J)
        for step in tl.static_range(ROUNDS):
            before = b - tl.load(shift + (ROUNDS - 1 - step) * total + a)
            b = a
            a = tl.where(before < 0, before + total, before)
        weight_J = (a.to(tl.int64) * total + b < count).to(tl.float32)
        loss_J *= weight_J
        q_KJ *= weight_J[None, :]
    tl.store(scores + offsets, q_KJ, mask=mask)
    tl.store(losses + i * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(j < others, loss_J, 0.0), 0))


def side_loss(side: Side) -> Tensor:
    """See :data:`fpcn_kernels.pairs.problem.SideLoss`.

    Hidden vectors, G and q are multiplied in TF32 where PyTorch's own float32 products may be
    (``torch.set_float32_matmul_precision``), else in three TF32 products, which come near float32.
    """
    classes, others = side.g_IK.shape[1], len(side.others_JD)
    loss = torch.zeros((), dtype=torch.float64, device=side.own_ID.device)
    if others == 0:
        return loss
    for images in ranges(len(side.own_ID), min(_SCORES_BYTES // (4 * classes * others), _GRID_LIMIT)):
        loss += _block_loss(side, images)
    return loss


def _block_loss(side: Side, images: slice) -> Tensor:
    kernels = few_classes_triton if side.g_IK.shape[1] <= _FEW_CLASSES else many_classes_triton
    block = Block(side, images, kernels.extra_constants())
    scores_IKJ = side.own_ID.new_empty(block.count, block.classes, block.others)
    kernels.scores(block, scores_IKJ)
    losses = _softmax(block, scores_IKJ)
    if side.gradients is not None:
        _add_own_gradients(block, side.gradients, scores_IKJ, *kernels.own_gradients(block, scores_IKJ))
        side.gradients.others_JD.addcmul_(kernels.others_gradients(block, scores_IKJ).sum(0), side.scale)
    return losses.sum(dtype=torch.float64)


def _softmax(block: Block, scores_IKJ: Tensor) -> Tensor:
    """The losses [I, tiles of J] of the scores, which become their gradients q."""
    side, class_tile = block.side, triton.next_power_of_2(block.classes)
    tile = max(1, min(4096 // class_tile, 512, triton.next_power_of_2(block.others)))
    tiles = triton.cdiv(block.others, tile)
    losses = side.own_ID.new_empty(block.count, tiles)
    chosen = side.chosen
    launch(
        _softmax_kernel,
        (tiles, block.count, 1),
        scores_IKJ,
        side.labels_I[block.images],
        side.labels_I if chosen is None else chosen.shift_RN.to(torch.int32),
        losses,
        side.own_first + block.images.start,
        side.others_first,
        block.others,
        0 if chosen is None else chosen.images,
        0 if chosen is None else chosen.count,
        K=block.classes,
        OWN_IS_A=side.own_is_a,
        ROUNDS=0 if chosen is None else RandomPairs.ROUNDS,
        BK=class_tile,
        BJ=tile,
        num_warps=4,
    )
    return losses


def _add_own_gradients(block: Block, gradients: SideGradients, q_IKJ: Tensor, grad_own: Tensor, grad_G: Tensor) -> None:
    """Add what the own images and their layers get, in shares that are summed here."""
    images, scale = block.images, block.side.scale
    gradients.G_IKD[images].addcmul_(grad_G.sum(0), scale)
    gradients.g_IK[images].addcmul_(q_IKJ.sum(2), scale)
    gradients.own_ID[images].addcmul_(grad_own.sum(0), scale)
