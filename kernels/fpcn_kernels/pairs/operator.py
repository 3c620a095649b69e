"""Classification loss over pairs of images (equations 6, 8, 9 and the class term of 12).

    X_f = W_out f(W_in [x_a; x_b] + b_in) + b_out                          (6)
    logits_a = W_cls (x_a * X_f) + b_cls,  logits_b likewise from x_b      (8, 9)
    loss = mean over the chosen ordered pairs (a, b) of (CE(logits_a, y_a) + CE(logits_b, y_b)) / 2

Written out, N^2 pairs cost N^2 (6 C D + 4 K C) FLOPs. Re-associated, a pair costs 4 (K - 1) D and no tensor has
N^2 rows:

    W_in [x_a; x_b] = W_a x_a + W_b x_b = u_a + v_b
    logits_a = G_a f(u_a + v_b) + g_a  with  G_a = (W_cls * x_a) W_out,  g_a = W_cls (x_a * b_out) + b_cls

The pass that computes the loss computes the gradients too; the backward only scales them. Legend: see pairs/problem.py.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from fpcn_kernels import reference
from fpcn_kernels._launch import rounds_products, use_triton
from fpcn_kernels._validate import BACKENDS, accumulation_dtype, check_choice, check_fraction
from fpcn_kernels.pairs import backend_torch
from fpcn_kernels.pairs.arguments import check_count, check_operands, check_pairs, check_shifts, in_bounds, seed_tensor
from fpcn_kernels.pairs.assemble import all_pairs, is_cheaper_listed, listed_pairs
from fpcn_kernels.pairs.head import PairHead
from fpcn_kernels.pairs.problem import Gradients, PairProblem, SideLoss
from fpcn_kernels.pairs.random import PairDropout, RandomPairs, RandomShifts
from fpcn_kernels.shards import RowExchange, RowShards

# Of u and v of the global batch. Beyond it they pass from rank to rank instead of being gathered.
_GATHERED_BYTES = 2**28
Pairs = Tensor | RandomPairs | RandomShifts | None
"""Which pairs count: a list, random ones, those of shifts, or all."""
# What the operator differentiates: the pooled vectors and the head's parameters.
_OPERANDS = 1 + len(PairHead._fields)


def pair_contrast(
    pooled: Tensor,
    labels: Tensor,
    head: PairHead,
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    pairs: int | Tensor | None = None,
    shifts: int | None = None,
    group: dist.ProcessGroup | None = None,
    matmul: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Mean cross-entropy over ordered pairs of images, both sides of each (equations 6, 8, 9, class term of 12).

    With ``group`` the batch is the global one: ``pooled`` and ``labels`` are this rank's contiguous slice of it, in
    rank order, of any size. The mean over ranks of the losses and of the parameters' gradients, which is what DDP
    computes, equals the single-process values; the gradient of ``pooled`` is world_size times the single-process rows,
    so that what DDP averages further down is exact too. Only u and v (2 D numbers an image) and their gradients travel,
    all within the forward pass.

    Every random choice is a function of the seed and of global indices: the same for any backend, tiling and number of
    ranks. NaN or Inf in any argument makes the loss and all gradients NaN; so does a label or a listed index out of
    bounds on an accelerator, where raising an error would wait for the device. The loss can be differentiated once.

    Args:
        pooled: image vectors x [B, C]; float64, or any of float32, bfloat16 and float16, which accumulate in float32.
        labels: int64 classes [B] in [0, K).
        head: the layers that classify a pair, with C channels, D hidden units and K classes.
        activation: f, ``"relu"`` or ``"identity"``.
        dropout: chance that a hidden unit of a pair is zeroed, in [0, 1); the others are divided by 1 - dropout.
        seed: of dropout and random pairs: an int or a 0-dim int64 tensor, equal on all ranks.
        pairs: ``None`` for all N^2 ordered pairs of the global batch, self pairs included; an int n for n distinct
            random ones; or an int64 list [P, 2] of global indices, the whole list on every rank.
        shifts: instead of ``pairs``: an int m for the pairs (a, a + s mod N) of all images a with m distinct random
            shifts s, for m / N of the cost of all pairs.
        group: process group over whose ranks the global batch is split; ``None``: the batch is all there is.
        matmul: how the Triton kernels multiply hidden vectors. ``"highest"``: in float32, or nearly; ``"high"``: in
            float16 with float32 sums, the faster (docs/kernels.md has the errors of both); ``"auto"``: ``"high"`` where
            PyTorch may round products of float32, as under autocast.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"reference"`` (no ``group``).

    Returns:
        The loss, 0-dim, float32 (float64 where an argument is float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: the backend is not available.
    """
    check_operands(pooled, labels, head)
    check_choice("activation", activation, ("relu", "identity"))
    check_fraction("dropout", dropout)
    check_pairs(pairs, pooled.device)
    check_shifts(shifts, pairs)
    seed = seed_tensor(seed, pooled.device)
    check_choice("matmul", matmul, ("auto", "highest", "high"))
    check_choice("backend", backend, BACKENDS)
    if backend == "reference":
        if group is not None:
            raise ValueError("backend 'reference' runs in a single process, got a group; use backend='torch'")
        return reference.pair_contrast(
            pooled, labels, head, activation=activation, dropout=dropout, seed=int(seed), pairs=pairs, shifts=shifts
        )
    with_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (pooled, *head))
    listed, count = (pairs, None) if isinstance(pairs, Tensor) else (None, pairs)
    group_name = None if group is None else group.group_name
    if matmul == "auto" and torch.is_autocast_enabled(pooled.device.type):
        matmul = "high"
    choice = (labels, seed, listed, count, shifts, activation == "relu", float(dropout), matmul)
    return _pair_contrast(pooled, *head, *choice, group_name, backend, with_gradients)[0]


@torch.library.custom_op("fpcn::pair_contrast", mutates_args=())
def _pair_contrast(
    pooled: Tensor,
    fuse_in_weight: Tensor,
    fuse_in_bias: Tensor,
    fuse_out_weight: Tensor,
    fuse_out_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    labels: Tensor,
    seed: Tensor,
    listed: Tensor | None,
    count: int | None,
    shifts: int | None,
    relu: bool,
    dropout: float,
    matmul: str,
    group_name: str | None,
    backend: str,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and, if asked for, the gradients of the seven floating-point operands, in the accumulation dtype.

    An operator's schema knows tensors, numbers and strings alone: the head comes in parts, and a group by its name.
    """
    head = PairHead(fuse_in_weight, fuse_in_bias, fuse_out_weight, fuse_out_bias, classifier_weight, classifier_bias)
    dtype = accumulation_dtype(pooled, *head)
    group = None if group_name is None else dist.distributed_c10d._resolve_process_group(group_name)  # pyright: ignore
    with torch.autocast(pooled.device.type, enabled=False):
        x_BC, head = pooled.to(dtype), PairHead(*(t.to(dtype) for t in head))
        shards = RowShards(len(x_BC), group, x_BC.device)
        classes, width = len(head.classifier_bias), len(head.fuse_in_bias)
        check_count(count, shifts, shards.total)
        labels, poison = in_bounds("labels", labels, classes)
        if listed is not None:
            listed, listed_poison = in_bounds("pairs", listed, shards.total)
            poison = poison + listed_poison
        pairs: Pairs = listed if count is None else RandomPairs(count, seed, shards.total)
        if shifts is not None:
            pairs = RandomShifts(shifts, seed, shards.total)
        unit_dropout = PairDropout(dropout, seed, shards.total, width, dtype) if dropout else None
        scale = _scale(x_BC, head, shards, pairs) + poison
        rounded = matmul == "high" or (matmul == "auto" and rounds_products())
        problem = _problem(x_BC, labels, head, shards.first, relu, unit_dropout, scale, rounded)
        gradients = Gradients.zeros(problem) if with_gradients else None
        loss, grad_uv_B2D = _summed_loss(problem, shards, pairs, gradients, backend)
        loss = loss.to(dtype) * scale
        if gradients is None or grad_uv_B2D is None:
            return loss, *(loss.new_empty(0) for _ in range(_OPERANDS))  # pyright: ignore
        return loss, *_operand_gradients(x_BC, head.fuse_in_weight, gradients, grad_uv_B2D)  # pyright: ignore


def _scale(x_BC: Tensor, head: PairHead, shards: RowShards, pairs: Pairs) -> Tensor:
    """The factor, 0-dim, of this rank's summed loss such that the mean over ranks is the mean over all sides of pairs.

    It is NaN where an operand is not finite, which a relu or a pair that is not chosen could hide.
    """
    chosen = shards.total**2 if pairs is None else len(pairs) if isinstance(pairs, Tensor) else pairs.count
    # Multiplication by zero makes NaN of all that is not finite.
    poison = 0 * torch.nn.utils.get_total_norm([t for t in (x_BC, *head) if t.numel()], torch.inf)
    return len(shards.sizes) / (2 * chosen) + poison


def _problem(
    x_BC: Tensor,
    labels: Tensor,
    head: PairHead,
    first: int,
    relu: bool,
    dropout: PairDropout | None,
    scale: Tensor,
    rounded: bool,
) -> PairProblem:
    """The problem of this rank: its images go through the halves of the first layer here."""
    weight_a, weight_b = head.fuse_in_weight.chunk(2, 1)
    uv_B2D = torch.cat([torch.addmm(head.fuse_in_bias, x_BC, weight_a.T), x_BC @ weight_b.T], 1)
    return PairProblem(x_BC, uv_B2D, *head[2:], labels, first, relu, dropout, scale, rounded)


def _summed_loss(
    problem: PairProblem,
    shards: RowShards,
    pairs: Pairs,
    gradients: Gradients | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """This rank's share of the loss, unscaled, 0-dim float64; and the gradient of its u and v [B, 2 D].

    The other gradients are added to ``gradients``.
    """
    uv_B2D, with_gradients = problem.uv_B2D, gradients is not None
    classes, channels = problem.cls_weight_KC.shape
    random = None if isinstance(pairs, Tensor) else pairs
    loss = torch.zeros((), dtype=torch.float64, device=uv_B2D.device)
    if _are_listed(pairs, shards.total, channels, classes):
        exchange = RowExchange(shards, uv_B2D, with_gradients=with_gradients, ring=False)
        for everyone in exchange:
            loss += listed_pairs(problem, everyone, pairs, gradients)
    else:
        by_shifts = isinstance(pairs, RandomShifts)
        width = problem.out_weight_CD.shape[1]
        side_loss = _side_loss("torch" if by_shifts else backend, uv_B2D.device, uv_B2D.dtype, classes, width)
        bytes_of_all = shards.total * uv_B2D.shape[1] * uv_B2D.element_size()
        # Shifts lead from any image to any other.
        ring = bytes_of_all > _GATHERED_BYTES and not by_shifts
        exchange = RowExchange(shards, uv_B2D, with_gradients=with_gradients, ring=ring)
        for others in exchange:
            loss += all_pairs(problem, others, random, gradients, side_loss)
    if gradients is None or exchange.gradients is None:
        return loss, None
    return loss, gradients.uv_B2D + exchange.gradients


def _are_listed(pairs: Pairs, images: int, channels: int, classes: int) -> TypeGuard[Tensor | RandomPairs]:
    """Whether each pair has a fused vector of its own."""
    if isinstance(pairs, RandomPairs):
        return is_cheaper_listed(pairs.count, images, channels, classes - 1)
    return isinstance(pairs, Tensor)


def _operand_gradients(
    x_BC: Tensor, in_weight: Tensor, gradients: Gradients, grad_uv_B2D: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the seven operands, in their order: u and v hand theirs on to x, W_in and b_in."""
    weight_a, weight_b = in_weight.chunk(2, 1)
    grad_u_BD, grad_v_BD = grad_uv_B2D.chunk(2, 1)
    grad_in_weight = in_weight.new_empty(in_weight.shape)
    for grad_half_BD, columns in zip((grad_u_BD, grad_v_BD), grad_in_weight.chunk(2, 1), strict=True):
        torch.mm(grad_half_BD.T, x_BC, out=columns)
    return (
        gradients.x_BC.addmm_(grad_u_BD, weight_a).addmm_(grad_v_BD, weight_b),
        grad_in_weight,
        grad_u_BD.sum(0),
        gradients.out_weight_CD,
        gradients.out_bias_C,
        gradients.cls_weight_KC,
        gradients.cls_bias_K,
    )


def _side_loss(backend: str, device: torch.device, dtype: torch.dtype, classes: int, width: int) -> SideLoss:
    limit = None
    if classes > 1024 or width > 2048:
        limit = f"they hold at most 1024 classes and 2048 hidden units, got K = {classes} and D = {width}"
    if use_triton(backend, device, dtype, limit):
        from fpcn_kernels.pairs import backend_triton

        return backend_triton.side_loss
    return backend_torch.side_loss


@_pair_contrast.register_fake
def _(*arguments):
    *tensors, with_gradients = arguments
    operands = tensors[:_OPERANDS]
    dtype = accumulation_dtype(*operands)
    shapes = [t.shape if with_gradients else (0,) for t in operands]
    return tuple(operands[0].new_empty(shape, dtype=dtype) for shape in [(), *shapes])


def _setup_context(ctx, inputs, output):
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [t.dtype for t in inputs[:_OPERANDS]]
    ctx.other_inputs = len(inputs) - _OPERANDS


def _backward(ctx, grad_loss, *_):
    # Scaled before they are rounded: a loss scale keeps float16 gradients above underflow.
    scaled = [(grad_loss * t).to(dtype) for t, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    return (*scaled, *[None] * ctx.other_inputs)


_pair_contrast.register_autograd(_backward, setup_context=_setup_context)
