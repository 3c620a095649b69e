"""A block of pairs whose scores are stored: what its kernels read, and what their launchers share. Legend:
pairs/problem.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fpcn_kernels._launch import choose, interpreting, launch, multiprocessors, tuning
from fpcn_kernels.pairs.problem import Side

# A multiple of it is a number of its own to Triton, whatever the batch; and of every tile of others in q's reads.
_SCORES_ALIGNMENT = 64

Config = dict[str, int]
"""Tile sizes, warps and stages of a launch, by the names that Triton gives them."""


class HalfOperands(NamedTuple):
    """What a side's matrix units multiply in float16, scaled to [-1, 1] by powers of two, which round nothing."""

    own_ID: Tensor
    others_JD: Tensor
    G_ILD: Tensor
    unscale: Tensor
    """[2] float32: what u and v, and what G has to be multiplied by. Found on the device, and left there."""

    @classmethod
    def of(cls, side: Side) -> HalfOperands:
        rows = torch.maximum(side.own_ID.abs().amax(), side.others_JD.abs().amax())
        exponents = torch.frexp(torch.stack([rows, side.G_ILD.abs().amax()])).exponent
        factors = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), -exponents)
        scaled = side.own_ID * factors[0], side.others_JD * factors[0], side.G_ILD * factors[1]
        return cls(*(t.half() for t in scaled), 1 / factors)


class Block:
    """Some of a side's own images, few enough for their scores to be stored, with all of its others.

    Args:
        side: the side, whose tensors are on the device that computes.
        images: which of its own images.
        half: the side's operands in float16, if its kernels multiply those.

    Attributes:
        count, others, classes, width: I, J, L and D of the block.
        G_ILD, g_IL: the block's rows of the side's.
        rows: own images and others with their strides, as the kernels take them.
        operands: what products are made of: rows with their strides, G, and scales; in float16 where the side has such.
        factors: G and the scales alone.
        words: what the kernels hash for dropout, of own images, others and units. Without dropout no kernel reads them.
        constants: of every launch.
    """

    def __init__(self, side: Side, images: slice, half: HalfOperands | None) -> None:
        self.side, self.images = side, images
        self.count, self.others = images.stop - images.start, len(side.others_JD)
        self.classes, self.width = side.G_ILD.shape[1:]
        self.G_ILD, self.g_IL = side.G_ILD[images], side.g_IL[images]
        self.rows = (side.own_ID[images], side.own_ID.stride(0), side.others_JD, side.others_JD.stride(0))
        self.is_half = half is not None
        self.operands = (*self.rows, self.G_ILD, self.g_IL)
        if half is not None:
            own_ID, others_JD, G_ILD, unscale = half
            strides = own_ID.stride(0), others_JD.stride(0)
            self.operands = (own_ID[images], strides[0], others_JD, strides[1], G_ILD[images], unscale)
        self.factors = self.operands[4:]
        self.words = self._dropout_words()
        self.constants: dict[str, int] = {
            "D": self.width,
            "L": self.classes,
            "RELU": side.relu,
            "DROPPED": 0 if side.dropout is None else side.dropout.threshold,
            "PTX": not interpreting(),
        }

    @property
    def has_dropout(self) -> bool:
        return self.side.dropout is not None

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
        if self.has_dropout:
            return self.g_IL
        return torch.baddbmm(self.g_IL[..., None], self.G_ILD, self.side.own_ID[self.images, :, None])[..., 0]

    def new_scores(self) -> Tensor:
        """Room for the scores [I, L, J], in rows that are padded to whole tiles, to be read without masks."""
        padded = triton.cdiv(self.others, _SCORES_ALIGNMENT) * _SCORES_ALIGNMENT
        return self.g_IL.new_empty(self.count, self.classes, padded)[..., : self.others]

    def choose(self, kernel: str, table: list[Config], run: Callable[[Config], None]) -> None:
        """Run a kernel with a configuration of ``table``; see :func:`fpcn_kernels._launch.choose`."""
        sizes = (triton.next_power_of_2(size) for size in (self.count, self.others))
        choose((f"pair_contrast.{kernel}", self.is_half, *sizes, *self.constants.values()), table, run)

    def shares(self, terms: int, programs: int, programs_at_once: int) -> tuple[int, int]:
        """Size and number of the shares of a sum of ``terms`` that let its programs fill every multiprocessor."""
        wanted = programs_at_once * multiprocessors(self.side.own_ID.device)
        shares = max(1, min(triton.cdiv(wanted, programs), triton.cdiv(terms, 16)))
        share = triton.cdiv(terms, shares)
        return share, triton.cdiv(terms, share)

    def add_others_gradients(
        self,
        kernel: triton.JITFunction,
        table: list[Config],
        factors: tuple[Tensor, ...],
        q_ILJ: Tensor,
        total_JD: Tensor,
        **extra: bool,
    ) -> None:
        """Add what ``kernel`` finds for the others, times the side's scale.

        Enough others fill the multiprocessors, and their tiles are added in place; for fewer the sum over the own
        images is cut into shares, which a second launch adds up.

        Args:
            kernel: an ``others_kernel``; all of them are launched alike.
            table: its configurations.
            factors: what q is multiplied by, as the kernel takes it. Slopes come from rows in float32, as in float16 a
                unit near zero may fall on the other side of the relu.
            q_ILJ: the gradients of the scores.
            total_JD: what to add to.
            extra: further constants of the kernel.
        """
        tiles = triton.cdiv(self.others, table[0]["BJ"]) * triton.cdiv(self.width, table[0]["BD"])
        share, shares = self.shares(self.count, tiles, 16 // table[0]["num_warps"])
        # Whoever times configurations launches each many times, and wants the sum once.
        added = shares == 1 and not tuning()
        sums_SJD = total_JD[None] if added else self.G_ILD.new_empty(shares, *total_JD.shape)

        def run(config: Config) -> None:
            grid = (triton.cdiv(self.others, config["BJ"]), triton.cdiv(self.width, config["BD"]), shares)
            sums = sums_SJD, sums_SJD.stride(1), self.side.scale
            inputs = (*self.rows, *factors, *self.words, q_ILJ, q_ILJ.stride(1), *sums, self.count, self.others, share)
            launch(kernel, grid, *inputs, ADDED=added, **extra, **self.constants, **config)

        self.choose("others", table, run)
        if not added:
            total_JD.addcmul_(sums_SJD.sum(0), self.side.scale)
