"""What the kernels do with a tile of pairs: hidden vectors, dropout, sums over active units, loads. Legend:
pairs/problem.py."""

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
def shifted(own_1D, others_JD, RELU: tl.constexpr):
    """f(own + others) - own [J, D] of one own image, f the relu or the identity; NaN stays NaN."""
    return tl.maximum(others_JD, -own_1D, propagate_nan=tl.PropagateNan.ALL) if RELU else others_JD


@triton.jit
def add_where_active(own, others, q, sum_shifted, sum_slope, RELU: tl.constexpr, PTX: tl.constexpr):
    """``sum_shifted`` + q others and ``sum_slope`` + q where the relu of own + others is active, else unchanged.

    Predicated additions, as the compiler would make a selection of each of them.
    """
    if not RELU:
        return sum_shifted + q * others, sum_slope + q
    elif PTX:
        q, others = tl.broadcast(q, others)
        return tl.inline_asm_elementwise(
            """{
            .reg .pred active;
            setp.gt.f32 active, $4, $5;
            mov.f32 $0, $2;
            mov.f32 $1, $3;
            @active fma.rn.f32 $0, $6, $4, $2;
            @active add.f32 $1, $3, $6;
            }""",
            "=&f,=&f,f,f,f,f,f",
            [sum_shifted, sum_slope, others, -own, q],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        active = others > -own
        return tl.where(active, sum_shifted + q * others, sum_shifted), tl.where(active, sum_slope + q, sum_slope)


@triton.jit
def add_product_where_active(own, others, q, G, total, RELU: tl.constexpr, PTX: tl.constexpr):
    """``total`` + q G where the relu of own + others is active, else unchanged."""
    if not RELU:
        return total + q * G
    elif PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred active;
            setp.gt.f32 active, $2, $3;
            mov.f32 $0, $1;
            @active fma.rn.f32 $0, $4, $5, $1;
            }""",
            "=&f,f,f,f,f,f",
            [total, others, -own, q, G],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.where(others > -own, total + q * G, total)


@triton.jit
def keeps(own_words, others_words, unit_words, i, j, d, others, D: tl.constexpr, DROPPED: tl.constexpr):
    """Whether dropout keeps a unit [J, D], where DROPPED of the 2^32 words are dropped."""
    own_word = tl.load(own_words + i).to(tl.uint32, bitcast=True)
    others_word_J = tl.load(others_words + j, mask=j < others, other=0).to(tl.uint32, bitcast=True)
    unit_word_D = tl.load(unit_words + d, mask=d < D, other=0).to(tl.uint32, bitcast=True)
    return mix(mix(others_word_J ^ own_word)[:, None] ^ unit_word_D[None, :]) >= DROPPED


@triton.jit
def kept_scale(DROPPED: tl.constexpr):
    """What a unit that dropout keeps is multiplied by, 1 / (1 - p)."""
    return 1.0 / (1.0 - DROPPED / 4294967296)


@triton.jit
def dropout(own_words, others_words, unit_words, i, j, d, others, D: tl.constexpr, DROPPED: tl.constexpr):
    """Multipliers [J, D], 0 or 1 / (1 - p)."""
    kept_JD = keeps(own_words, others_words, unit_words, i, j, d, others, D, DROPPED)
    return tl.where(kept_JD, kept_scale(DROPPED), 0.0)


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


@triton.jit
def store_or_add(rows, row_stride, scale, sum_JD, j, d, others, D: tl.constexpr, ADDED: tl.constexpr):
    """Store a tile of this share's sum in ``rows`` [S, J, D]; or add ``scale`` times it, if there is one share."""
    offsets = (tl.program_id(2) * others + j).to(tl.int64)[:, None] * row_stride + d[None, :]
    mask = (j < others)[:, None] & (d < D)[None, :]
    if ADDED:
        sum_JD = tl.load(rows + offsets, mask=mask, other=0.0) + tl.load(scale) * sum_JD
    tl.store(rows + offsets, sum_JD, mask=mask)


@triton.jit
def half_activation(own, others, RELU: tl.constexpr, PTX: tl.constexpr):
    """f(own + others) of float16 operands that broadcast, two units an instruction; NaN stays NaN."""
    if not RELU:
        return own + others
    elif PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 ones; mov.b32 ones, 0x3C003C00U; fma.rn.relu.f16x2 $0, $1, ones, $2; }",
            "=r,r,r",
            [own, others],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.maximum(own + others, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def active(hidden, PTX: tl.constexpr):
    """1 where a hidden unit is above 0, else 0; PTX for float16."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 zeros; mov.b32 zeros, 0U; set.gt.f16x2.f16x2 $0, $1, zeros; }",
            "=r,r",
            [hidden],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.where(hidden > 0, 1.0, 0.0).to(hidden.dtype)
