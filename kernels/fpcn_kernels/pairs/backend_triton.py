"""One side of a block of pairs in fused kernels; docs/kernels.md has their plan. Legend: pairs/problem.py.

scores -> softmax, in place -> sums over the others, sums over the own images. Hidden vectors exist in registers only;
the scores of a piece of the block, later their gradients q, are all that is stored, [I, K, J] within a budget.
Every sum has one owner and a fixed order: no atomics, bitwise deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpcn_kernels._launch import choose, device_limits, launch
from fpcn_kernels.pairs import few_classes_triton as fma
from fpcn_kernels.pairs import many_classes_triton as dot
from fpcn_kernels.pairs.problem import Side, ranges
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
    """In place, scores [I, K, J] become q = softmax - one-hot, 0 for pairs not chosen; losses [I, tiles of J]."""
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
        loss += _Block(side, images).loss()
    return loss


class _Block:
    """Some of a side's images: few enough for their scores to be stored."""

    def __init__(self, side: Side, images: slice) -> None:
        self.side, self.images = side, images
        self.count, self.others = images.stop - images.start, len(side.others_JD)
        self.classes, self.width = side.G_IKD.shape[1:]
        self.few_classes = self.classes <= _FEW_CLASSES
        self.kernels: Any = fma if self.few_classes else dot
        self.rows = (side.own_ID[images], side.own_ID.stride(0), side.others_JD, side.others_JD.stride(0))
        self.words = self._dropout_words()
        self.constants: dict[str, Any] = {
            "D": self.width,
            "K": self.classes,
            "RELU": side.relu,
            "DROPPED": 0 if side.dropout is None else side.dropout.threshold,
        }
        if not self.few_classes:
            exact = torch.get_float32_matmul_precision() == "highest"
            self.constants["PRECISION"] = "tf32x3" if exact else "tf32"
            # Three products keep each operand in two parts: twice the registers of a tile.
            self.parts = 2 if exact else 1

    def _dropout_words(self) -> tuple[Tensor, Tensor, Tensor]:
        side = self.side
        if side.dropout is None:
            return side.own_ID, side.own_ID, side.own_ID  # not read
        first, second, unit = side.dropout.words()
        own, others = (first, second) if side.own_is_a else (second, first)
        return own[side.own_first + self.images.start :], others[side.others_first :], unit

    def loss(self) -> Tensor:
        scores_IKJ = self.side.own_ID.new_empty(self.count, self.classes, self.others)
        self._scores(scores_IKJ)
        losses = self._softmax(scores_IKJ)
        if self.side.gradients is not None:
            self._own_gradients(scores_IKJ)
            self._others_gradients(scores_IKJ)
        return losses.sum(dtype=torch.float64)

    def _scores(self, scores_IKJ: Tensor) -> None:
        G, g = self.side.G_IKD[self.images], self.side.g_IK[self.images]

        def run(config: dict[str, int]) -> None:
            tiles = triton.cdiv(self.others, config["BJ"])
            arguments = (*self.rows, G, g, *self.words, scores_IKJ)
            if self.few_classes:
                grid = (tiles, triton.cdiv(self.count, config["BI"]), 1)
                arguments += (self.count, self.others)
            else:
                grid = (tiles, triton.cdiv(self.classes, config["BK"]), self.count)
                arguments += (self.others,)
            launch(self.kernels.scores_kernel, grid, *arguments, **self.constants, **config)

        if self.few_classes:
            # Others and products take D / 32 + 4 K registers of a thread for each row of a tile.
            rows = 4 if self.width // 32 + 4 * self.classes <= 32 else 1 if self.width > 1024 else 2
            table = [
                {"BI": 16, "BJ": rows, "BD": 128, "num_warps": 1},
                {"BI": 32, "BJ": rows, "BD": 128, "num_warps": 1},
                {"BI": 16, "BJ": max(1, rows // 2), "BD": 128, "num_warps": 1},
            ]
        else:
            table = [
                {"BJ": 64, "BD": 32, "BK": self._class_tile(128), "num_warps": 4 * self.parts, "num_stages": 3},
                {"BJ": 64, "BD": 32, "BK": self._class_tile(64), "num_warps": 4, "num_stages": 3},
                {"BJ": 128, "BD": 32, "BK": self._class_tile(128), "num_warps": 8, "num_stages": 3},
            ]
        self._choose("scores", table, run)

    def _softmax(self, scores_IKJ: Tensor) -> Tensor:
        side, class_tile = self.side, triton.next_power_of_2(self.classes)
        tile = max(1, min(4096 // class_tile, 512, triton.next_power_of_2(self.others)))
        tiles = triton.cdiv(self.others, tile)
        losses = side.own_ID.new_empty(self.count, tiles)
        chosen = side.chosen
        launch(
            _softmax_kernel,
            (tiles, self.count, 1),
            scores_IKJ,
            side.labels_I[self.images],
            side.labels_I if chosen is None else chosen.shift_RN.to(torch.int32),
            losses,
            side.own_first + self.images.start,
            side.others_first,
            self.others,
            0 if chosen is None else chosen.images,
            0 if chosen is None else chosen.count,
            K=self.classes,
            OWN_IS_A=side.own_is_a,
            ROUNDS=0 if chosen is None else RandomPairs.ROUNDS,
            BK=class_tile,
            BJ=tile,
            num_warps=4,
        )
        return losses

    def _own_gradients(self, q_IKJ: Tensor) -> None:
        G = self.side.G_IKD[self.images]
        arguments = (*self.rows, G, *self.words, q_IKJ)
        if self.few_classes:
            # Sums of sixteen rows in registers: the fewer classes, the more images share a row of the others.
            group = max(1, 16 // (self.classes + 1))
            table = [
                {"BI": group, "BD": 128, "num_warps": 1},
                {"BI": max(1, group // 2), "BD": 256, "num_warps": 1},
                {"BI": max(1, group // 2), "BD": 128, "num_warps": 1},
            ]
            share, shares = self._shares(self.others, triton.cdiv(self.count, group) * triton.cdiv(self.width, 128), 16)
            grad_own = G.new_empty(shares, self.count, self.width)
            grad_G = G.new_empty(shares, *G.shape)

            def run(config: dict[str, int]) -> None:
                grid = (triton.cdiv(self.count, config["BI"]), triton.cdiv(self.width, config["BD"]), shares)
                sizes = (self.count, self.others, share)
                launch(fma.own_kernel, grid, *arguments, grad_own, grad_G, *sizes, **self.constants, **config)
        else:
            class_tile = self._class_tile(64)
            table = [
                {"BJ": 32, "BD": 64 // self.parts, "BK": class_tile, "num_warps": 4, "num_stages": 2},
                {"BJ": 32, "BD": 128, "BK": class_tile, "num_warps": 8, "num_stages": 2},
            ]
            class_tiles = triton.cdiv(self.classes, class_tile)
            grad_own = G.new_empty(class_tiles, self.count, self.width)
            grad_G = G.new_empty(1, *G.shape)

            def run(config: dict[str, int]) -> None:
                grid = (triton.cdiv(self.width, config["BD"]), class_tiles, self.count)
                sizes = (self.count, self.others)
                launch(dot.own_kernel, grid, *arguments, grad_own, grad_G, *sizes, **self.constants, **config)

        self._choose("own", table, run)
        gradients, scale = self.side.gradients, self.side.scale
        assert gradients is not None
        gradients.G_IKD[self.images].addcmul_(grad_G.sum(0), scale)
        gradients.g_IK[self.images].addcmul_(q_IKJ.sum(2), scale)
        gradients.own_ID[self.images].addcmul_(grad_own.sum(0), scale)

    def _others_gradients(self, q_IKJ: Tensor) -> None:
        G = self.side.G_IKD[self.images]
        if self.few_classes:
            table = [
                {"BJ": 8, "BD": 128, "num_warps": 1},
                {"BJ": 4, "BD": 128, "num_warps": 1},
                {"BJ": 4, "BD": 256, "num_warps": 1},
            ]
        else:
            table = [
                {"BJ": 64, "BD": 64, "BK": 16, "num_warps": 4, "num_stages": 3},
                {"BJ": 64, "BD": 64, "BK": self._class_tile(32), "num_warps": 8, "num_stages": 2},
                {"BJ": 64, "BD": 128, "BK": 16, "num_warps": 8, "num_stages": 3},
            ]
        tiles = triton.cdiv(self.others, table[0]["BJ"]) * triton.cdiv(self.width, table[0]["BD"])
        share, shares = self._shares(self.count, tiles, 16 // table[0]["num_warps"])
        grad_others = G.new_empty(shares, self.others, self.width)

        def run(config: dict[str, int]) -> None:
            grid = (triton.cdiv(self.others, config["BJ"]), triton.cdiv(self.width, config["BD"]), shares)
            arguments = (*self.rows, G, *self.words, q_IKJ, grad_others, self.count, self.others, share)
            launch(self.kernels.others_kernel, grid, *arguments, **self.constants, **config)

        self._choose("others", table, run)
        gradients = self.side.gradients
        assert gradients is not None
        gradients.others_JD.addcmul_(grad_others.sum(0), self.side.scale)

    def _shares(self, terms: int, programs: int, programs_at_once: int) -> tuple[int, int]:
        """Size and number of the shares of a sum of ``terms`` that let its programs fill every multiprocessor."""
        wanted = programs_at_once * device_limits(self.side.own_ID.device).multiprocessors
        shares = max(1, min(triton.cdiv(wanted, programs), triton.cdiv(terms, 16)))
        share = triton.cdiv(terms, shares)
        return share, triton.cdiv(terms, share)

    def _class_tile(self, largest: int) -> int:
        return min(largest, max(16, triton.next_power_of_2(self.classes)))

    def _choose(self, kernel: str, table: list[dict[str, int]], run: Any) -> None:
        sizes = (triton.next_power_of_2(size) for size in (self.count, self.others))
        choose((f"pair_contrast.{kernel}", *sizes, *self.constants.values()), table, run)
