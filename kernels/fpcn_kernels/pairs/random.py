"""Counter-based randomness: every number is a function of (seed, indices) alone, hence the same for any tiling, number
of ranks, device and backend. docs/kernels.md has the definitions. Tensors hold 32-bit words as int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# Domains keep the streams that share a seed apart.
_FIRST_IMAGE, _SECOND_IMAGE, _UNIT, _PAIRS, _SHIFTS = 1, 2, 3, 4, 5


def mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit flips about half of the output bits.

    Both multipliers are below 2^31, so that products of words fit into int64.
    """
    word = word ^ (word >> 16)
    word = word.mul_(0x21F0AAAD).bitwise_and_(_WORD)
    word = word.bitwise_xor_(word >> 15).mul_(0x735A2D97).bitwise_and_(_WORD)
    return word.bitwise_xor_(word >> 15)


def _key(seed: Tensor, domain: int) -> Tensor:
    return mix(mix((seed & _WORD) ^ domain) ^ ((seed >> 32) & _WORD))


class PairDropout:
    """Inverted dropout on the hidden units of a pair, keyed by (seed, first image, second image, unit).

    Args:
        probability: chance that a unit is zeroed, in (0, 1).
        seed: 0-dim int64 tensor.
        images: number of images in the global batch.
        units: hidden width D.
        dtype: of the multipliers.
    """

    def __init__(self, probability: float, seed: Tensor, images: int, units: int, dtype: torch.dtype) -> None:
        index = torch.arange(max(images, units), device=seed.device)
        self.first = mix(_key(seed, _FIRST_IMAGE) ^ index[:images])
        self.second = mix(_key(seed, _SECOND_IMAGE) ^ index[:images])
        self.unit = mix(_key(seed, _UNIT) ^ index[:units])
        self.threshold = round(probability * 2**32)
        self.scale = 1 / (1 - probability)
        self.dtype = dtype

    def words(self) -> tuple[Tensor, Tensor, Tensor]:
        """``first``, ``second`` and ``unit`` as the 32-bit words that they are, for kernels."""
        return self.first.to(torch.int32), self.second.to(torch.int32), self.unit.to(torch.int32)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Multipliers [..., D], 0 or 1 / (1 - p), for broadcastable global indices ``a`` and ``b`` [...]."""
        pair = mix(self.first[a] ^ self.second[b])
        keep = mix(pair[..., None] ^ self.unit) >= self.threshold
        return keep.to(self.dtype).mul_(self.scale)


class RandomPairs:
    """``count`` distinct ordered pairs out of N^2: the first of a permutation keyed by the seed, with 8 N words stored.

    A Feistel network on Z_N x Z_N: a round maps (l, r) to (r, l + F(r) mod N). Adding modulo N makes it a bijection for
    any N, without cycle walking; it runs backwards as cheaply, so that "is (a, b) chosen?" needs no list.

    Args:
        count: number of pairs, at most N^2.
        seed: 0-dim int64 tensor.
        images: number N of images in the global batch.
    """

    ROUNDS = 8

    def __init__(self, count: int, seed: Tensor, images: int) -> None:
        self.count, self.images = count, images
        round_key = mix(_key(seed, _PAIRS) ^ torch.arange(self.ROUNDS, device=seed.device))
        words = mix(round_key[:, None] ^ torch.arange(images, device=seed.device))
        self.shift_RN = (words * images) >> 32

    def listed(self, positions: slice) -> tuple[Tensor, Tensor]:
        """The chosen pairs (a, b) at ``positions`` in [0, count)."""
        index = torch.arange(positions.start, positions.stop, device=self.shift_RN.device)
        a, b = index // self.images, index % self.images
        for shift_N in self.shift_RN:
            a, b = b, (a + shift_N[b]) % self.images
        return a, b

    def contain(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether the pairs (a, b) are chosen; the indices may broadcast."""
        for shift_N in self.shift_RN.flip(0):
            a, b = (b - shift_N[a]) % self.images, a
        return a * self.images + b < self.count


class RandomShifts:
    """The pairs (a, a + s mod N) of all images a with ``shifts`` distinct shifts s, drawn by the seed.

    Each ordered pair is as likely to be chosen as any other, and each image comes first, and second, equally often.

    Args:
        shifts: number of shifts, at most N.
        seed: 0-dim int64 tensor.
        images: number N of images in the global batch.

    Attributes:
        shift_J: the shifts.
        count: number of pairs.
    """

    def __init__(self, shifts: int, seed: Tensor, images: int) -> None:
        self.images, self.count = images, shifts * images
        words = mix(_key(seed, _SHIFTS) ^ torch.arange(images, device=seed.device))
        self.shift_J = words.argsort()[:shifts]  # no two words are equal

    def partners(self, own_I1: Tensor, cols: slice, *, own_is_a: bool) -> Tensor:
        """The global indices [I, J] of those that own images are paired with, as the first or as the second."""
        shift_1J = self.shift_J[cols]
        return (own_I1 + shift_1J if own_is_a else own_I1 - shift_1J) % self.images
