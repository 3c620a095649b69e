"""One side of a block of pairs in fused kernels; docs/kernels.md has their plan. Legend: pairs/problem.py.

scores -> softmax, in place -> sums over the others, sums over the own images. Hidden vectors exist in registers only;
the scores of a piece of the block, later their gradients q, are all that is stored, [I, L, J] within a budget.
Every sum has one owner and a fixed order: no atomics, bitwise deterministic.
"""

from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpcn_kernels._launch import launch
from fpcn_kernels.pairs import few_classes_half_triton, few_classes_triton, many_classes_triton
from fpcn_kernels.pairs.block_triton import Block, HalfOperands
from fpcn_kernels.pairs.problem import Side, SideGradients, ranges
from fpcn_kernels.pairs.random import RandomPairs

# Scores that the second-level cache can hold beside what the kernels read.
_SCORES_BYTES = 2**25
# CUDA's bound on all but the first dimension of a grid.
_GRID_LIMIT = 65535
# Without the first class. In float32 multiply-adds beat matrix units, which would pad the classes to 16; in float16
# these have eight columns, but whole others of more units do not fit a program.
_FEW_CLASSES, _FEW_CLASSES_HALF, _WIDTH_HALF = 7, 8, 512


@triton.jit
def _softmax_kernel(
    scores,
    pitch,
    labels,
    shift,
    losses,
    own_first,
    others_first,
    others,
    total,
    count,
    L: tl.constexpr,
    OWN_IS_A: tl.constexpr,
    ROUNDS: tl.constexpr,
    BL: tl.constexpr,
    BJ: tl.constexpr,
):
    """The scores [I, L, J] become q = softmax - one-hot, 0 for pairs not chosen; losses are [I, tiles of J]. The first
    class has none: its score is 0, and its q the negative sum of the others."""
    i = tl.program_id(1)
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    k = tl.arange(0, BL)
    offsets = (i * L + k[:, None]) * pitch + j[None, :]
    mask = (k < L)[:, None] & (j < others)[None, :]
    score_LJ = tl.load(scores + offsets, mask=mask, other=0.0)
    score_LJ = tl.where((k < L)[:, None], score_LJ, -float("inf"))
    top_J = tl.maximum(tl.max(score_LJ, 0), 0.0)
    power_LJ = tl.exp(score_LJ - top_J[None, :])
    sum_J = tl.exp(-top_J) + tl.sum(power_LJ, 0)
    is_label_L1 = (k + 1 == tl.load(labels + i))[:, None]
    loss_J = tl.log(sum_J) + top_J - tl.sum(tl.where(is_label_L1, score_LJ, 0.0), 0)
    q_LJ = power_LJ / sum_J[None, :] - tl.where(is_label_L1, 1.0, 0.0)
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
        q_LJ *= weight_J[None, :]
    # What pads a row to whole tiles is read, too.
    q_LJ = tl.where((j < others)[None, :], q_LJ, 0.0)
    tl.store(scores + offsets, q_LJ, mask=(k < L)[:, None] & (j < pitch)[None, :])
    tl.store(losses + i * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(j < others, loss_J, 0.0), 0))


def side_loss(side: Side) -> Tensor:
    """See :data:`fpcn_kernels.pairs.problem.SideLoss`.

    Hidden vectors, G and q are multiplied in float16 if the side says ``rounded``; else in float32 for few classes, and
    in three products of TF32, which come near float32, for many.
    """
    classes, others = side.g_IL.shape[1], len(side.others_JD)
    loss = torch.zeros((), dtype=torch.float64, device=side.own_ID.device)
    if others == 0 or classes == 0 or len(side.own_ID) == 0:
        return loss
    half = HalfOperands.of(side) if side.rounded else None
    for images in ranges(len(side.own_ID), min(_SCORES_BYTES // (4 * classes * others), _GRID_LIMIT)):
        loss += _block_loss(Block(side, images, half))
    return loss


def _block_loss(block: Block) -> Tensor:
    side, kernels = block.side, _kernels(block)
    scores_ILJ = block.new_scores()
    kernels.scores(block, scores_ILJ)
    losses = _softmax(block, scores_ILJ)
    if side.gradients is not None:
        _add_own_gradients(block, side.gradients, scores_ILJ, *kernels.own_gradients(block, scores_ILJ))
        kernels.add_others_gradients(block, scores_ILJ, side.gradients.others_JD)
    return losses.sum(dtype=torch.float64)


def _kernels(block: Block) -> ModuleType:
    if block.is_half and block.classes <= _FEW_CLASSES_HALF and block.width <= _WIDTH_HALF:
        return few_classes_half_triton
    if not block.is_half and block.classes <= _FEW_CLASSES:
        return few_classes_triton
    return many_classes_triton


def _softmax(block: Block, scores_ILJ: Tensor) -> Tensor:
    """The losses [I, tiles of J] of the scores, which become their gradients q."""
    side, class_tile = block.side, triton.next_power_of_2(block.classes)
    pitch = scores_ILJ.stride(1)
    tile = max(1, min(2048 // class_tile, 512, triton.next_power_of_2(pitch)))
    tiles = triton.cdiv(pitch, tile)
    losses = side.own_ID.new_empty(block.count, tiles)
    chosen = side.chosen
    launch(
        _softmax_kernel,
        (tiles, block.count, 1),
        scores_ILJ,
        pitch,
        side.labels_I[block.images],
        side.labels_I if chosen is None else chosen.shift_RN.to(torch.int32),
        losses,
        side.own_first + block.images.start,
        side.others_first,
        block.others,
        0 if chosen is None else chosen.images,
        0 if chosen is None else chosen.count,
        L=block.classes,
        OWN_IS_A=side.own_is_a,
        ROUNDS=0 if chosen is None else RandomPairs.ROUNDS,
        BL=class_tile,
        BJ=tile,
        num_warps=4,
    )
    return losses


def _add_own_gradients(block: Block, gradients: SideGradients, q_ILJ: Tensor, grad_own: Tensor, grad_G: Tensor) -> None:
    """Add what the own images and their layers get, in shares that are summed here."""
    images, scale = block.images, block.side.scale
    gradients.G_ILD[images].addcmul_(grad_G.sum(0), scale)
    gradients.g_IL[images].addcmul_(q_ILJ.sum(2), scale)
    gradients.own_ID[images].addcmul_(grad_own.sum(0), scale)
