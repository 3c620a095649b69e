"""A block of pairs whose scores are stored: what its kernels read, and what their launchers share. Legend:
pairs/problem.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from fpcn_kernels._launch import choose, launch, multiprocessors, tuning
from fpcn_kernels.pairs.problem import Side

# A multiple of it is a number of its own to Triton, whatever the batch; and of every tile of others in q's reads.
_SCORES_ALIGNMENT = 16

Config = dict[str, int]
"""Tile sizes, warps and stages of a launch, by the names that Triton gives them."""


class Block:
    """Some of a side's own images, few enough for their scores to be stored, with all of its others.

    Args:
        side: the side, whose tensors are on the device that computes.
        images: which of its own images.
        extra: constants that the block's kernels have beside those of every kernel.

    Attributes:
        count, others, classes, width: I, J, L and D of the block.
        G_ILD, g_IL: the block's rows of the side's.
        rows: own images and others with their strides, as the kernels take them.
        words: what the kernels hash for dropout, of own images, others and units. Without dropout no kernel reads them.
        constants: of every launch.
    """

    def __init__(self, side: Side, images: slice, extra: dict[str, str | bool]) -> None:
        self.side, self.images = side, images
        self.count, self.others = images.stop - images.start, len(side.others_JD)
        self.classes, self.width = side.G_ILD.shape[1:]
        self.G_ILD, self.g_IL = side.G_ILD[images], side.g_IL[images]
        self.rows = (side.own_ID[images], side.own_ID.stride(0), side.others_JD, side.others_JD.stride(0))
        self.words = self._dropout_words()
        self.constants: dict[str, int | str | bool] = {
            "D": self.width,
            "L": self.classes,
            "RELU": side.relu,
            "DROPPED": 0 if side.dropout is None else side.dropout.threshold,
            **extra,
        }

    def _dropout_words(self) -> tuple[Tensor, Tensor, Tensor]:
        side = self.side
        if side.dropout is None:
            return side.own_ID, side.own_ID, side.own_ID
        first, second, unit = side.dropout.words()
        own, others = (first, second) if side.own_is_a else (second, first)
        return own[side.own_first + self.images.start :], others[side.others_first :], unit

    @property
    def shifted_g_IL(self) -> Tensor:
        """What G hidden lacks of a logit: g, and without dropout also G own, as kernels leave own out of hidden."""
        if self.side.dropout is not None:
            return self.g_IL
        return torch.baddbmm(self.g_IL[..., None], self.G_ILD, self.side.own_ID[self.images, :, None])[..., 0]

    def new_scores(self) -> Tensor:
        """Room for the scores [I, L, J], in rows that are padded to whole tiles, to be read without masks."""
        padded = triton.cdiv(self.others, _SCORES_ALIGNMENT) * _SCORES_ALIGNMENT
        return self.g_IL.new_empty(self.count, self.classes, padded)[..., : self.others]

    def choose(self, kernel: str, table: list[Config], run: Callable[[Config], None]) -> None:
        """Run a kernel with a configuration of ``table``; see :func:`fpcn_kernels._launch.choose`."""
        sizes = (triton.next_power_of_2(size) for size in (self.count, self.others))
        choose((f"pair_contrast.{kernel}", *sizes, *self.constants.values()), table, run)

    def shares(self, terms: int, programs: int, programs_at_once: int) -> tuple[int, int]:
        """Size and number of the shares of a sum of ``terms`` that let its programs fill every multiprocessor."""
        wanted = programs_at_once * multiprocessors(self.side.own_ID.device)
        shares = max(1, min(triton.cdiv(wanted, programs), triton.cdiv(terms, 16)))
        share = triton.cdiv(terms, shares)
        return share, triton.cdiv(terms, share)

    def add_others_gradients(
        self, kernel: triton.JITFunction, table: list[Config], q_ILJ: Tensor, total_JD: Tensor
    ) -> None:
        """Add what ``kernel`` finds for the others, times the side's scale.

        Enough others fill the multiprocessors, and their tiles are added in place; for fewer the sum over the own
        images is cut into shares, which a second launch adds up.

        Args:
            kernel: the ``others_kernel`` of few or of many classes, which are launched alike.
            table: its configurations.
            q_ILJ: the gradients of the scores.
            total_JD: what to add to.
        """
        tiles = triton.cdiv(self.others, table[0]["BJ"]) * triton.cdiv(self.width, table[0]["BD"])
        share, shares = self.shares(self.count, tiles, 16 // table[0]["num_warps"])
        # Whoever times configurations launches each many times, and wants the sum once.
        added = shares == 1 and not tuning()
        sums_SJD = total_JD[None] if added else self.G_ILD.new_empty(shares, *total_JD.shape)

        def run(config: Config) -> None:
            grid = (triton.cdiv(self.others, config["BJ"]), triton.cdiv(self.width, config["BD"]), shares)
            sums = sums_SJD, sums_SJD.stride(1), self.side.scale
            inputs = (*self.rows, self.G_ILD, *self.words, q_ILJ, q_ILJ.stride(1))
            launch(
                kernel, grid, *inputs, *sums, self.count, self.others, share, ADDED=added, **self.constants, **config
            )

        self.choose("others", table, run)
        if not added:
            total_JD.addcmul_(sums_SJD.sum(0), self.side.scale)
