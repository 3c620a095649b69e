"""What the backends of pair_contrast compute, and for whom: one rank's share of the pairs of a global batch.

Legend, here and in the backends: N images in the global batch, B of them on this rank, I of these in a block; J others
that they are paired with; C channels, D hidden units, K classes, L = K - 1 of them but the first; T pairs in a chunk of
a list. u and v are the halves of the first layer: the hidden vector of (a, b) is f(u[a] + v[b]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor

from fpcn_kernels.pairs.random import PairDropout, RandomPairs, RandomShifts


@dataclass(frozen=True)
class PairProblem:
    """This rank's images and the layers behind u and v."""

    x_BC: Tensor
    uv_B2D: Tensor
    out_weight_CD: Tensor
    out_bias_C: Tensor
    cls_weight_KC: Tensor
    cls_bias_K: Tensor
    labels_B: Tensor
    first: int
    """Global index of this rank's first image."""
    relu: bool
    dropout: PairDropout | None
    scale: Tensor
    """0-dim factor of the summed loss and of its gradients."""
    rounded: bool
    """Whether kernels may multiply hidden vectors in float16."""


@dataclass(frozen=True)
class Gradients:
    """Accumulators, named as in :class:`PairProblem`."""

    x_BC: Tensor
    uv_B2D: Tensor
    out_weight_CD: Tensor
    out_bias_C: Tensor
    cls_weight_KC: Tensor
    cls_bias_K: Tensor

    @classmethod
    def zeros(cls, problem: PairProblem) -> Gradients:
        operands = (getattr(problem, field.name) for field in fields(cls))
        return cls(*(operand.new_zeros(operand.shape) for operand in operands))


class SideGradients(NamedTuple):
    """Accumulators, named as in :class:`Side`."""

    own_ID: Tensor
    others_JD: Tensor
    G_ILD: Tensor
    g_IL: Tensor


class Side(NamedTuple):
    """One side of the pairs between a block of this rank's images and others: whose logits G hidden + g are wanted.

    They are those of all classes but the first, relative to the first, whose logit is 0: a softmax and its gradient do
    not change with a number that is added to all logits.
    """

    own_is_a: bool
    """Whether the own images are the first or the second of their pairs: own is then u and others v, or vice versa."""
    own_ID: Tensor
    others_JD: Tensor
    own_first: int
    """Global index of the first own image."""
    others_first: int
    G_ILD: Tensor
    g_IL: Tensor
    labels_I: Tensor
    relu: bool
    dropout: PairDropout | None
    chosen: RandomPairs | RandomShifts | None
    """Which pairs count; all if ``None``."""
    scale: Tensor
    rounded: bool
    gradients: SideGradients | None
    """Accumulators to add to, times ``scale``; ``None`` to compute the loss only."""


SideLoss = Callable[[Side], Tensor]
"""The sum of a side's cross-entropies, without ``scale``, 0-dim float64; adds to the side's gradients."""


def ranges(total: int, size: int) -> Iterator[slice]:
    """Cut [0, total) into pieces of ``size`` elements, of one where ``size`` is less."""
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
