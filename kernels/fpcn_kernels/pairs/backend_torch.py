"""One side of a block of pairs in PyTorch, tile by tile; docs/kernels.md derives it. Legend: pairs/problem.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fpcn_kernels.pairs.problem import Side, ranges
from fpcn_kernels.pairs.random import PairDropout

# A tile of hidden vectors that fits the cache.
_TILE_BYTES = {"cpu": 2**22, "accelerator": 2**26}


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
    """Gradient of the preactivation. A dropped unit needs no slope, so the hidden vector itself tells relu's."""
    if relu:
        grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden, 0)
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
    (images, width), others, classes = side.own_ID.shape, len(side.others_JD), side.g_IK.shape[1]
    device = "cpu" if side.own_ID.device.type == "cpu" else "accelerator"
    vectors = _TILE_BYTES[device] // (side.own_ID.element_size() * (width + classes))
    columns = min(others, max(1, vectors // 4))
    loss = torch.zeros((), dtype=torch.float64, device=side.own_ID.device)
    for rows in ranges(images, vectors // max(1, columns)):
        for cols in ranges(others, columns):
            loss += _tile_loss(side, rows, cols)
    return loss


def _tile_loss(side: Side, rows: slice, cols: slice) -> Tensor:
    own_ID, others_JD, G_IKD = side.own_ID[rows], side.others_JD[cols], side.G_IKD[rows]
    own_I1 = side.own_first + torch.arange(rows.start, rows.stop, device=own_ID.device)[:, None]
    other_1J = side.others_first + torch.arange(cols.start, cols.stop, device=own_ID.device)
    a, b = (own_I1, other_1J) if side.own_is_a else (other_1J, own_I1)
    hidden_IJD, kept_IJD = hidden_vectors(own_ID[:, None] + others_JD, side.relu, side.dropout, a, b)
    logits_IJK = torch.baddbmm(side.g_IK[rows, None], hidden_IJD, G_IKD.mT)
    weight_IJ = None if side.chosen is None else side.chosen.contain(a, b).to(own_ID.dtype)
    loss, grad_IJK = cross_entropy(logits_IJK, side.labels_I[rows, None], weight_IJ, side.scale)
    if side.gradients is not None:
        side.gradients.G_IKD[rows].baddbmm_(grad_IJK.mT, hidden_IJD)
        side.gradients.g_IK[rows] += grad_IJK.sum(1)
        grad_IJD = hidden_backward(grad_IJK @ G_IKD, side.relu, hidden_IJD, kept_IJD)
        side.gradients.own_ID[rows] += grad_IJD.sum(1)
        side.gradients.others_JD[cols] += grad_IJD.sum(0)
    return loss
