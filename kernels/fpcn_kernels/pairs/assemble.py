"""From images to sides of pairs and back, and lists of pairs; docs/kernels.md derives every line. Legend:
pairs/problem.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fpcn_kernels.pairs.backend_torch import cross_entropy, hidden_backward, hidden_vectors
from fpcn_kernels.pairs.problem import Gradients, PairProblem, Side, SideGradients, SideLoss, ranges
from fpcn_kernels.pairs.random import RandomPairs, RandomShifts
from fpcn_kernels.shards import PassingRows

# A block of images, or a chunk of listed pairs, that fills the matrix units.
_BLOCK_BYTES = {"cpu": 2**25, "accelerator": 2**28}


def is_cheaper_listed(count: int, images: int, channels: int, classes: int) -> bool:
    """Multiply-adds of ``count`` fused vectors against those of G for every image and of logits for every pair.

    ``classes`` are those that have logits: all but the first.
    """
    return count * channels < classes * images * (channels + 2 * images)


def all_pairs(
    problem: PairProblem,
    others: PassingRows,
    chosen: RandomPairs | RandomShifts | None,
    gradients: Gradients | None,
    side_loss: SideLoss,
) -> Tensor:
    """The pairs (i, *) on the a side and (*, i) on the b side for this rank's images i, unscaled; ``None`` chooses all.

    The logits of image i in a pair are G_i hidden + g_i with G_i = (W_cls * x_i) W_out: once per image, not per pair.
    For the sides W_cls and b_cls are those of all classes but the first, less those of the first.
    """
    out_weight_CD = problem.out_weight_CD
    # Logits relative to the first class: a softmax does not see what is common to all of them.
    weight_LC = problem.cls_weight_KC[1:] - problem.cls_weight_KC[:1]
    bias_L = problem.cls_bias_K[1:] - problem.cls_bias_K[:1]
    grad_weight_LC, grad_bias_L = torch.zeros_like(weight_LC), torch.zeros_like(bias_L)
    loss = torch.zeros((), dtype=torch.float64, device=out_weight_CD.device)
    elements_of_image = 2 * max(1, len(bias_L)) * sum(out_weight_CD.shape)
    for images in ranges(len(problem.x_BC), _budget(problem) // elements_of_image):
        x_IC = problem.x_BC[images]
        weight_ILC = weight_LC * x_IC[:, None]
        G_ILD, g_IL = weight_ILC @ out_weight_CD, weight_ILC @ problem.out_bias_C + bias_L
        grad_G_ILD, grad_g_IL = torch.zeros_like(G_ILD), torch.zeros_like(g_IL)
        for own_is_a in (True, False):
            own, other = (0, 1) if own_is_a else (1, 0)  # which half of uv
            side_gradients = None
            if gradients is not None and others.gradients is not None:
                own_grad_ID = gradients.uv_B2D[images].chunk(2, 1)[own]
                side_gradients = SideGradients(own_grad_ID, others.gradients.chunk(2, 1)[other], grad_G_ILD, grad_g_IL)
            side = Side(
                own_is_a,
                problem.uv_B2D[images].chunk(2, 1)[own],
                others.rows.chunk(2, 1)[other],
                problem.first + images.start,
                others.first,
                G_ILD,
                g_IL,
                problem.labels_B[images],
                problem.relu,
                problem.dropout,
                chosen,
                problem.scale,
                problem.rounded,
                side_gradients,
            )
            loss += side_loss(side)
        if gradients is None:
            continue
        grad_weight_ILC = grad_G_ILD @ out_weight_CD.T + grad_g_IL[..., None] * problem.out_bias_C
        gradients.x_BC[images] += (grad_weight_ILC * weight_LC).sum(1)
        grad_weight_LC += (grad_weight_ILC * x_IC[:, None]).sum(0)
        grad_bias_L += grad_g_IL.sum(0)
        gradients.out_weight_CD.addmm_(weight_ILC.flatten(0, 1).T, grad_G_ILD.flatten(0, 1))
        gradients.out_bias_C.addmv_(weight_ILC.flatten(0, 1).T, grad_g_IL.flatten())
    if gradients is not None:
        for total, grad in ((gradients.cls_weight_KC, grad_weight_LC), (gradients.cls_bias_K, grad_bias_L)):
            total[1:] += grad
            total[0] -= grad.sum(0)
    return loss


def listed_pairs(
    problem: PairProblem, everyone: PassingRows, pairs: Tensor | RandomPairs, gradients: Gradients | None
) -> Tensor:
    """A list [P, 2] of pairs (a, b) in chunks, unscaled: for few of them a fused vector each is cheaper than all G.

    Each rank computes the sides of its own images. ``everyone`` holds the rows of all ranks.
    """
    own, first = len(problem.x_BC), problem.first
    is_whole = own == len(everyone.rows)
    u_ND, v_ND = everyone.rows.chunk(2, 1)
    loss = torch.zeros((), dtype=torch.float64, device=problem.x_BC.device)
    for a_T, b_T in _chunks(problem, pairs):
        own_a_T, own_b_T = ((index >= first) & (index < first + own) for index in (a_T, b_T))
        if not is_whole:
            touches_own_T = own_a_T | own_b_T
            a_T, b_T, own_a_T, own_b_T = (t[touches_own_T] for t in (a_T, b_T, own_a_T, own_b_T))
            if len(a_T) == 0:
                continue
        hidden_TD, kept_TD = hidden_vectors(u_ND[a_T] + v_ND[b_T], problem.relu, problem.dropout, a_T, b_T)
        fused_TC = torch.addmm(problem.out_bias_C, hidden_TD, problem.out_weight_CD.T)
        grad_fused_TC = torch.zeros_like(fused_TC)
        for index_T, own_T in ((a_T, own_a_T), (b_T, own_b_T)):
            weight_T = None if is_whole else own_T.to(fused_TC.dtype)
            row_T = (index_T - first).clamp(0, own - 1)
            x_TC = problem.x_BC[row_T]
            contrast_TC = x_TC * fused_TC
            logits_TK = torch.addmm(problem.cls_bias_K, contrast_TC, problem.cls_weight_KC.T)
            side_loss, grad_TK = cross_entropy(logits_TK, problem.labels_B[row_T], weight_T, problem.scale)
            loss += side_loss
            if gradients is None:
                continue
            gradients.cls_weight_KC.addmm_(grad_TK.T, contrast_TC)
            gradients.cls_bias_K.add_(grad_TK.sum(0))
            grad_contrast_TC = grad_TK @ problem.cls_weight_KC
            gradients.x_BC.index_add_(0, row_T, grad_contrast_TC * fused_TC)
            grad_fused_TC.addcmul_(grad_contrast_TC, x_TC)
        if gradients is None or everyone.gradients is None:
            continue
        gradients.out_weight_CD.addmm_(grad_fused_TC.T, hidden_TD)
        gradients.out_bias_C.add_(grad_fused_TC.sum(0))
        grad_TD = hidden_backward(grad_fused_TC @ problem.out_weight_CD, problem.relu, hidden_TD, kept_TD)
        grad_u_ND, grad_v_ND = everyone.gradients.chunk(2, 1)
        grad_u_ND.index_add_(0, a_T, grad_TD)
        grad_v_ND.index_add_(0, b_T, grad_TD)
    return loss


def _chunks(problem: PairProblem, pairs: Tensor | RandomPairs) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (a, b) in pieces such that the tensors of a chunk stay small."""
    count = len(pairs) if isinstance(pairs, Tensor) else pairs.count
    for chunk in ranges(count, _budget(problem) // (4 * sum(problem.out_weight_CD.shape))):
        yield (pairs[chunk, 0], pairs[chunk, 1]) if isinstance(pairs, Tensor) else pairs.listed(chunk)


def _budget(problem: PairProblem) -> int:
    """A budget of bytes as a number of elements."""
    device = "cpu" if problem.x_BC.device.type == "cpu" else "accelerator"
    return _BLOCK_BYTES[device] // problem.x_BC.element_size()
