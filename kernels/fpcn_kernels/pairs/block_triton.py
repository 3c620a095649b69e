"""A block of pairs whose scores are stored: what its kernels read, and what their launchers share. Legend:
pairs/problem.py."""

from __future__ import annotations

from collections.abc import Callable

import triton
from torch import Tensor

from fpcn_kernels._launch import choose, launch, multiprocessors
from fpcn_kernels.pairs.problem import Side

Config = dict[str, int]
"""Tile sizes, warps and stages of a launch, by the names that Triton gives them."""


class Block:
    """Some of a side's own images, few enough for their scores to be stored, with all of its others.

    Args:
        side: the side, whose tensors are on the device that computes.
        images: which of its own images.
        extra: constants that the block's kernels have beside those of every kernel.

    Attributes:
        count, others, classes, width: I, J, K and D of the block.
        G_IKD, g_IK: the block's rows of the side's.
        rows: own images and others with their strides, as the kernels take them.
        words: what the kernels hash for dropout, of own images, others and units. Without dropout no kernel reads them.
        constants: of every launch.
    """

    def __init__(self, side: Side, images: slice, extra: dict[str, str]) -> None:
        self.side, self.images = side, images
        self.count, self.others = images.stop - images.start, len(side.others_JD)
        self.classes, self.width = side.G_IKD.shape[1:]
        self.G_IKD, self.g_IK = side.G_IKD[images], side.g_IK[images]
        self.rows = (side.own_ID[images], side.own_ID.stride(0), side.others_JD, side.others_JD.stride(0))
        self.words = self._dropout_words()
        self.constants: dict[str, int | str] = {
            "D": self.width,
            "K": self.classes,
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

    def others_gradients(self, kernel: triton.JITFunction, table: list[Config], q_IKJ: Tensor) -> Tensor:
        """What ``kernel`` finds for the others, [shares of the own images, J, D].

        Args:
            kernel: the ``others_kernel`` of few or of many classes, which are launched alike.
            table: its configurations.
            q_IKJ: the gradients of the scores.
        """
        tiles = triton.cdiv(self.others, table[0]["BJ"]) * triton.cdiv(self.width, table[0]["BD"])
        share, shares = self.shares(self.count, tiles, 16 // table[0]["num_warps"])
        grad_others = self.G_IKD.new_empty(shares, self.others, self.width)

        def run(config: Config) -> None:
            grid = (triton.cdiv(self.others, config["BJ"]), triton.cdiv(self.width, config["BD"]), shares)
            arguments = (*self.rows, self.G_IKD, *self.words, q_IKJ, grad_others, self.count, self.others, share)
            launch(kernel, grid, *arguments, **self.constants, **config)

        self.choose("others", table, run)
        return grad_others
