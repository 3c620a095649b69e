"""The hidden vectors of pairs inside a kernel, dropout included. Legend: pairs/problem.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(word):
    """The 32-bit hash of pairs/random.py; unsigned arithmetic wraps by itself."""
    word ^= word >> 16
    word *= 0x21F0AAAD
    word ^= word >> 15
    word *= 0x735A2D97
    return word ^ (word >> 15)


@triton.jit
def activation(own_1D, others_JD, RELU: tl.constexpr):
    """f(own + others) [J, D] of one own image; NaN stays NaN."""
    sum_JD = own_1D + others_JD
    return tl.maximum(sum_JD, 0.0, propagate_nan=tl.PropagateNan.ALL) if RELU else sum_JD


@triton.jit
def dropout(own_words, others_words, unit_words, i, j, d, others, D: tl.constexpr, DROPPED: tl.constexpr):
    """Multipliers [J, D], 0 or 1 / (1 - p), where DROPPED of the 2^32 words are dropped."""
    own_word = tl.load(own_words + i).to(tl.uint32, bitcast=True)
    others_word_J = tl.load(others_words + j, mask=j < others, other=0).to(tl.uint32, bitcast=True)
    unit_word_D = tl.load(unit_words + d, mask=d < D, other=0).to(tl.uint32, bitcast=True)
    word_JD = mix(mix(others_word_J ^ own_word)[:, None] ^ unit_word_D[None, :])
    return tl.where(word_JD >= DROPPED, 1.0 / (1.0 - DROPPED / 4294967296), 0.0)


@triton.jit
def load_rows(rows, row_stride, j, d, others, D: tl.constexpr):
    """A tile [J, D] of the rows of others, zeros outside."""
    offsets = j.to(tl.int64)[:, None] * row_stride + d[None, :]
    return tl.load(rows + offsets, mask=(j < others)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_row(row, d, D: tl.constexpr, BD: tl.constexpr):
    """Load a row as [1, D]: Triton gives it the layout of a tile, and need not convert it."""
    if D % BD == 0:
        return tl.load(row + d[None, :])
    else:
        return tl.load(row + d[None, :], mask=(d < D)[None, :], other=0.0)
