"""One side of a block of pairs in PyTorch, tile by tile; docs/kernels.md derives it. Legend: pairs/problem.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fpcn_kernels.pairs.problem import Side, SideGradients, ranges
from fpcn_kernels.pairs.random import PairDropout, RandomPairs, RandomShifts

# Hidden vectors that fit the cache, or fill a device.
_TILE_BYTES = {"cpu": 2**22, "accelerator": 2**26}
# Scores of a block of images, and later their gradients.
_SCORES_BYTES = 2**26


def hidden_vectors(
    preactivation: Tensor, relu: bool, dropout: PairDropout | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Hidden vectors of the pairs (a, b), in place, and the dropout multipliers that :func:`hidden_backward` wants."""
    hidden = preactivation.relu_() if relu else preactivation
    if dropout is None:
        return hidden, None
    kept = dropout(a, b)
    return hidden.mul_(kept), kept


def hidden_backward(grad_hidden: Tensor, relu: bool, hidden: Tensor, kept: Tensor | None) -> Tensor:
    """Gradient of the preactivation, in place. A dropped unit needs no slope, so the hidden vector tells relu's."""
    if relu:
        torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
    return grad_hidden if kept is None else grad_hidden.mul_(kept)


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
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


def side_loss(side: Side) -> Tensor:
    """See :data:`fpcn_kernels.pairs.problem.SideLoss`."""
    loss = torch.zeros((), dtype=torch.float64, device=side.own_ID.device)
    scores_of_image = side.own_ID.element_size() * _columns(side) * (side.g_IL.shape[1] + 1)
    for images in ranges(len(side.own_ID), _SCORES_BYTES // max(1, scores_of_image)):
        loss += _block_loss(side, images)
    return loss


def _block_loss(side: Side, images: slice) -> Tensor:
    """The loss of some own images, whose scores are kept; hidden vectors are computed again for the gradients."""
    count, others, classes = images.stop - images.start, _columns(side), side.g_IL.shape[1] + 1
    logits_IJK = side.own_ID.new_zeros(count, others, classes)  # that of the first class is 0
    for rows, cols in _tiles(side, images):
        logits_IJK[_within(rows, images), cols, 1:] = _tile_scores(side, rows, cols)
    weight_IJ = None
    if isinstance(side.chosen, RandomPairs):
        weight_IJ = side.chosen.contain(*_indices(side, images, slice(0, others))).to(logits_IJK.dtype)
    loss, grad_IJK = cross_entropy(logits_IJK, side.labels_I[images, None], weight_IJ, side.scale)
    if side.gradients is not None:
        grad_IJL = grad_IJK[..., 1:]
        side.gradients.g_IL[images] += grad_IJL.sum(1)
        for rows, cols in _tiles(side, images):
            _add_tile_gradients(side, rows, cols, grad_IJL[_within(rows, images), cols], side.gradients)
    return loss


def _tiles(side: Side, images: slice) -> Iterator[tuple[slice, slice]]:
    """The own images and the others of tiles, whose hidden vectors have a budget of bytes."""
    device = "cpu" if side.own_ID.device.type == "cpu" else "accelerator"
    vectors = _TILE_BYTES[device] // (side.own_ID.element_size() * side.own_ID.shape[1])
    columns = max(1, min(_columns(side), vectors))
    for rows in ranges(images.stop - images.start, vectors // columns):
        for cols in ranges(_columns(side), columns):
            yield slice(images.start + rows.start, images.start + rows.stop), cols


def _columns(side: Side) -> int:
    """How many others J each own image is paired with: all of them, or those that the shifts lead to."""
    return len(side.chosen.shift_J) if isinstance(side.chosen, RandomShifts) else len(side.others_JD)


def _within(rows: slice, images: slice) -> slice:
    return slice(rows.start - images.start, rows.stop - images.start)


def _indices(side: Side, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
    """The global indices (a, b) of the pairs of a tile, which broadcast to [I, J]."""
    device = side.own_ID.device
    own_I1 = side.own_first + torch.arange(rows.start, rows.stop, device=device)[:, None]
    if isinstance(side.chosen, RandomShifts):
        others = side.chosen.partners(own_I1, cols, own_is_a=side.own_is_a)
    else:
        others = side.others_first + torch.arange(cols.start, cols.stop, device=device)
    return (own_I1, others) if side.own_is_a else (others, own_I1)


def _rows_of_others(side: Side, rows: slice, cols: slice) -> slice | Tensor:
    """Where the others of a tile are among the rows of all: [J], or [I, J] where each own image has its own."""
    if not isinstance(side.chosen, RandomShifts):
        return cols
    a, b = _indices(side, rows, cols)
    return (b if side.own_is_a else a) - side.others_first


def _tile_hidden(side: Side, rows: slice, cols: slice) -> tuple[Tensor, Tensor | None]:
    """Hidden vectors [I, J, D] of a tile, and their dropout multipliers."""
    preactivation = side.own_ID[rows, None] + side.others_JD[_rows_of_others(side, rows, cols)]
    return hidden_vectors(preactivation, side.relu, side.dropout, *_indices(side, rows, cols))


def _tile_scores(side: Side, rows: slice, cols: slice) -> Tensor:
    """G hidden + g [I, J, L] of a tile.

    Without dropout relu(u + v) = max(v, -u) + u saves a pass over the tile: what the second term adds to the scores of
    an image is the same for all others.
    """
    own_I1D, G_ILD, g_I1L = side.own_ID[rows, None], side.G_ILD[rows], side.g_IL[rows, None]
    if side.dropout is None and side.relu:
        others = side.others_JD[_rows_of_others(side, rows, cols)]
        return torch.baddbmm(torch.baddbmm(g_I1L, own_I1D, G_ILD.mT), torch.maximum(others, -own_I1D), G_ILD.mT)
    return torch.baddbmm(g_I1L, _tile_hidden(side, rows, cols)[0], G_ILD.mT)


def _add_tile_gradients(side: Side, rows: slice, cols: slice, grad_IJL: Tensor, gradients: SideGradients) -> None:
    hidden_IJD, kept_IJD = _tile_hidden(side, rows, cols)
    gradients.G_ILD[rows].baddbmm_(grad_IJL.mT, hidden_IJD)
    grad_IJD = hidden_backward(grad_IJL @ side.G_ILD[rows], side.relu, hidden_IJD, kept_IJD)
    gradients.own_ID[rows] += grad_IJD.sum(1)
    others = _rows_of_others(side, rows, cols)
    if isinstance(others, slice):
        gradients.others_JD[others] += grad_IJD.sum(0)
    else:
        gradients.others_JD.index_add_(0, others.flatten(), grad_IJD.flatten(0, 1))
