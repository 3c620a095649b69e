"""Loss and gradients of pairs of images in PyTorch, tile by tile; docs/kernels.md derives every line.

Legend: N images in the global batch, B of them on this rank, C channels, D hidden units, K classes; I x J pairs in a
tile, T pairs in a chunk of a list. u and v are the halves of the first layer: the hidden vector of (a, b) is
f(u[a] + v[b]).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from fpcn_kernels._random import PairDropout, RandomPairs

# What a step's working set aims at: a tile of hidden vectors fits the cache, a block of images fills the matrix units.
_TILE_BYTES = {"cpu": 2**22, "accelerator": 2**26}
_BLOCK_BYTES = {"cpu": 2**25, "accelerator": 2**28}


@dataclass(frozen=True)
class Hidden:
    """The hidden layer's activation and dropout."""

    relu: bool
    dropout: PairDropout | None

    def forward(self, preactivation: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden vectors of the pairs (a, b), in place, and the dropout multipliers that :meth:`backward` wants."""
        hidden = preactivation.relu_() if self.relu else preactivation
        if self.dropout is None:
            return hidden, None
        kept = self.dropout(a, b)
        return hidden.mul_(kept), kept

    def backward(self, grad_hidden: Tensor, hidden: Tensor, kept: Tensor | None) -> Tensor:
        """Gradient of the preactivation. A dropped unit needs no slope, so the hidden vector itself tells relu's."""
        if self.relu:
            grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden, 0)
        return grad_hidden if kept is None else grad_hidden.mul_(kept)


@dataclass(frozen=True)
class PairProblem:
    """The global batch as one rank sees it (its own images, of the others only u and v) and the layers behind u, v."""

    x_BC: Tensor
    u_ND: Tensor
    v_ND: Tensor
    out_weight_CD: Tensor
    out_bias_C: Tensor
    cls_weight_KC: Tensor
    cls_bias_K: Tensor
    labels_B: Tensor
    first: int
    """Global index of this rank's first image."""
    hidden: Hidden
    scale: Tensor
    """0-dim factor of the summed loss and of its gradients."""

    @property
    def is_whole(self) -> bool:
        """Whether all images are this rank's."""
        return len(self.x_BC) == len(self.u_ND)

    def owns(self, index: Tensor) -> Tensor:
        """Whether the images at global indices are this rank's."""
        return (index >= self.first) & (index < self.first + len(self.x_BC))


@dataclass(frozen=True)
class Gradients:
    """Accumulators, named as in :class:`PairProblem`."""

    x_BC: Tensor
    u_ND: Tensor
    v_ND: Tensor
    out_weight_CD: Tensor
    out_bias_C: Tensor
    cls_weight_KC: Tensor
    cls_bias_K: Tensor

    @classmethod
    def zeros(cls, problem: PairProblem) -> Gradients:
        operands = (getattr(problem, field.name) for field in fields(cls))
        return cls(*(operand.new_zeros(operand.shape) for operand in operands))


def pair_loss(problem: PairProblem, pairs: Tensor | RandomPairs | None, gradients: Gradients | None) -> Tensor:
    """The scaled sum of the cross-entropies of the chosen pairs' sides that belong to this rank's images.

    Args:
        pairs: list [P, 2] of global indices, random pairs, or ``None`` for all N^2.
        gradients: accumulators to add to, or ``None`` to compute the loss only.
    """
    if pairs is None:
        loss = _all_pairs(problem, None, gradients)
    elif isinstance(pairs, Tensor):
        chunks = ((pairs[chunk, 0], pairs[chunk, 1]) for chunk in _chunks(problem, len(pairs)))
        loss = _listed_pairs(problem, chunks, gradients)
    elif _is_cheaper_listed(problem, pairs.count):
        loss = _listed_pairs(problem, (pairs.listed(chunk) for chunk in _chunks(problem, pairs.count)), gradients)
    else:
        loss = _all_pairs(problem, pairs, gradients)
    return loss.to(problem.scale.dtype) * problem.scale


def _is_cheaper_listed(problem: PairProblem, count: int) -> bool:
    """Multiply-adds of ``count`` fused vectors against those of G for every image and of logits for every pair."""
    (classes, channels), images = problem.cls_weight_KC.shape, len(problem.u_ND)
    return count * channels < classes * images * (channels + 2 * images)


def _all_pairs(problem: PairProblem, chosen: RandomPairs | None, gradients: Gradients | None) -> Tensor:
    """The pairs (i, *) on the a side and (*, i) on the b side for this rank's images i, unscaled; ``None`` chooses all.

    The logits of image i in a pair are G_i hidden + g_i with G_i = (W_cls * x_i) W_out: once per image, not per pair.
    """
    (classes, channels), width = problem.cls_weight_KC.shape, problem.u_ND.shape[1]
    cls_weight_KC, out_weight_CD = problem.cls_weight_KC, problem.out_weight_CD
    loss = torch.zeros((), dtype=torch.float64, device=out_weight_CD.device)
    for images in _ranges(len(problem.x_BC), _budget(problem, _BLOCK_BYTES) // (2 * classes * (channels + width))):
        x_IC = problem.x_BC[images]
        weight_IKC = cls_weight_KC * x_IC[:, None]
        G_IKD = weight_IKC @ out_weight_CD
        g_IK = weight_IKC @ problem.out_bias_C + problem.cls_bias_K
        grad_G_IKD, grad_g_IK = torch.zeros_like(G_IKD), torch.zeros_like(g_IK)
        for tile in _tiles(problem, images):
            loss += _tile_loss(problem, tile, G_IKD, g_IK, chosen, gradients, grad_G_IKD, grad_g_IK)
        if gradients is None:
            continue
        grad_weight_IKC = grad_G_IKD @ out_weight_CD.T + grad_g_IK[..., None] * problem.out_bias_C
        gradients.x_BC[images] = (grad_weight_IKC * cls_weight_KC).sum(1)
        gradients.cls_weight_KC.add_((grad_weight_IKC * x_IC[:, None]).sum(0))
        gradients.cls_bias_K.add_(grad_g_IK.sum(0))
        gradients.out_weight_CD.addmm_(weight_IKC.flatten(0, 1).T, grad_G_IKD.flatten(0, 1))
        gradients.out_bias_C.addmv_(weight_IKC.flatten(0, 1).T, grad_g_IK.flatten())
    return loss


class _Tile(NamedTuple):
    own_is_a: bool
    """Whether the own images are the first or the second of their pairs."""
    rows: slice
    """The own images, counted from the start of their block."""
    own: slice
    """The own images' global indices."""
    others: slice
    """The other images' global indices."""


def _tiles(problem: PairProblem, images: slice) -> Iterator[_Tile]:
    """Both sides of the pairs between a block of this rank's images and all images."""
    (total, width), classes = problem.u_ND.shape, len(problem.cls_bias_K)
    vectors = _budget(problem, _TILE_BYTES) // (width + classes)
    columns = min(total, max(1, vectors // 4))
    start = problem.first + images.start
    for own_is_a in (True, False):
        for rows in _ranges(images.stop - images.start, vectors // columns):
            for others in _ranges(total, columns):
                yield _Tile(own_is_a, rows, slice(start + rows.start, start + rows.stop), others)


def _tile_loss(
    problem: PairProblem,
    tile: _Tile,
    G_IKD: Tensor,
    g_IK: Tensor,
    chosen: RandomPairs | None,
    gradients: Gradients | None,
    grad_G_IKD: Tensor,
    grad_g_IK: Tensor,
) -> Tensor:
    """The unscaled loss of one tile of pairs; adds to the gradients of u, v, G and g if ``gradients`` is given."""
    own_is_a, rows, own, others = tile
    own_ND, other_ND = (problem.u_ND, problem.v_ND) if own_is_a else (problem.v_ND, problem.u_ND)
    own_I1 = torch.arange(own.start, own.stop, device=own_ND.device)[:, None]
    other_1J = torch.arange(others.start, others.stop, device=own_ND.device)
    a, b = (own_I1, other_1J) if own_is_a else (other_1J, own_I1)
    hidden_IJD, kept_IJD = problem.hidden.forward(own_ND[own, None] + other_ND[others], a, b)
    logits_IJK = torch.baddbmm(g_IK[rows, None], hidden_IJD, G_IKD[rows].mT)
    labels_I1 = problem.labels_B[own.start - problem.first : own.stop - problem.first, None]
    weight_IJ = None if chosen is None else chosen.contain(a, b).to(own_ND.dtype)
    loss, grad_IJK = _cross_entropy(logits_IJK, labels_I1, weight_IJ, problem.scale)
    if gradients is not None:
        grad_G_IKD[rows].baddbmm_(grad_IJK.mT, hidden_IJD)
        grad_g_IK[rows] += grad_IJK.sum(1)
        grad_IJD = problem.hidden.backward(grad_IJK @ G_IKD[rows], hidden_IJD, kept_IJD)
        grad_own, grad_other = (gradients.u_ND, gradients.v_ND) if own_is_a else (gradients.v_ND, gradients.u_ND)
        grad_own[own] += grad_IJD.sum(1)
        grad_other[others] += grad_IJD.sum(0)
    return loss


def _listed_pairs(problem: PairProblem, chunks: Iterable[tuple[Tensor, Tensor]], gradients: Gradients | None) -> Tensor:
    """A list of pairs (a, b) in chunks, unscaled: for few pairs a fused vector each is cheaper than a G per image."""
    own = len(problem.x_BC)
    loss = torch.zeros((), dtype=torch.float64, device=problem.x_BC.device)
    for a_T, b_T in chunks:
        if not problem.is_whole:
            touches_own_T = problem.owns(a_T) | problem.owns(b_T)
            a_T, b_T = a_T[touches_own_T], b_T[touches_own_T]
            if len(a_T) == 0:
                continue
        hidden_TD, kept_TD = problem.hidden.forward(problem.u_ND[a_T] + problem.v_ND[b_T], a_T, b_T)
        fused_TC = torch.addmm(problem.out_bias_C, hidden_TD, problem.out_weight_CD.T)
        grad_fused_TC = torch.zeros_like(fused_TC)
        for index_T in (a_T, b_T):
            weight_T = None if problem.is_whole else problem.owns(index_T).to(fused_TC.dtype)
            row_T = (index_T - problem.first).clamp(0, own - 1)
            x_TC = problem.x_BC[row_T]
            contrast_TC = x_TC * fused_TC
            logits_TK = torch.addmm(problem.cls_bias_K, contrast_TC, problem.cls_weight_KC.T)
            side_loss, grad_TK = _cross_entropy(logits_TK, problem.labels_B[row_T], weight_T, problem.scale)
            loss += side_loss
            if gradients is None:
                continue
            gradients.cls_weight_KC.addmm_(grad_TK.T, contrast_TC)
            gradients.cls_bias_K.add_(grad_TK.sum(0))
            grad_contrast_TC = grad_TK @ problem.cls_weight_KC
            gradients.x_BC.index_add_(0, row_T, grad_contrast_TC * fused_TC)
            grad_fused_TC.addcmul_(grad_contrast_TC, x_TC)
        if gradients is None:
            continue
        gradients.out_weight_CD.addmm_(grad_fused_TC.T, hidden_TD)
        gradients.out_bias_C.add_(grad_fused_TC.sum(0))
        grad_TD = problem.hidden.backward(grad_fused_TC @ problem.out_weight_CD, hidden_TD, kept_TD)
        gradients.u_ND.index_add_(0, a_T, grad_TD)
        gradients.v_ND.index_add_(0, b_T, grad_TD)
    return loss


def _cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of the cross-entropies of ``logits`` [..., K], in float64, and its gradient times ``scale``.

    ``weight`` has shape [...], ``labels`` broadcasts to it.
    """
    labels = labels.expand(logits.shape[:-1])[..., None]
    log_probability = logits.log_softmax(-1)
    picked = log_probability.gather(-1, labels)[..., 0]
    loss = -(picked if weight is None else picked * weight).sum(dtype=torch.float64)
    is_label = labels == torch.arange(logits.shape[-1], device=logits.device)
    grad = log_probability.exp_().sub_(is_label.to(logits.dtype))
    return loss, grad.mul_(scale if weight is None else (weight * scale)[..., None])


def _chunks(problem: PairProblem, count: int) -> Iterator[slice]:
    """Ranges of list positions such that the tensors of a chunk stay small."""
    return _ranges(count, _budget(problem, _BLOCK_BYTES) // (4 * sum(problem.out_weight_CD.shape)))


def _budget(problem: PairProblem, bytes_by_device: dict[str, int]) -> int:
    """A budget of bytes as a number of elements."""
    device = "cpu" if problem.x_BC.device.type == "cpu" else "accelerator"
    return bytes_by_device[device] // problem.x_BC.element_size()


def _ranges(total: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
