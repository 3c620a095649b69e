"""Sums and gathers over ranks, on the device of their argument.

``group=None`` means this process alone: nothing is sent, and no process group is needed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from fpcn_kernels.shards import RowShards
from torch import Tensor

Group = dist.ProcessGroup


def world_size(group: Group | None) -> int:
    """Ranks in ``group``; 1 for ``None``."""
    return 1 if group is None else dist.get_world_size(group)


@torch.no_grad()
def all_reduce_sum(tensor: Tensor, group: Group | None) -> Tensor:
    """Sum of ``tensor`` over ranks, as a new tensor with the same bits on every rank. Not differentiable."""
    total = tensor.detach().clone()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def all_gather(rows: Tensor, group: Group | None) -> Tensor:
    """Rows of all ranks, in rank order: [B, ...] here -> [N, ...] everywhere. B may differ between ranks.

    Differentiable under the convention that every rank computes the *same* function of the result (a loss of the global
    batch, say). Each rank then knows all gradients already, so its own rows get theirs without communication, times the
    number of ranks W: an engine that averages parameter gradients over ranks thereby restores the single-process value.
    """
    return rows if group is None else _AllGather.apply(rows, group, True)


def all_gather_unlike(rows: Tensor, group: Group | None) -> Tensor:
    """Rows of all ranks, in rank order: [B, F] here -> [N, F] everywhere.

    This is for ranks that each compute *another* part of the loss from the rows. It is differentiable: a rank's rows
    get the sum of the gradients of all ranks, so that the mean over ranks of the parameter gradients is the gradient of
    the mean over ranks of the losses.
    """
    return rows if group is None else _AllGather.apply(rows, group, False)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: Group, alike: bool) -> Tensor:
        ctx.shards, ctx.alike = RowShards(len(rows), group, rows.device), alike
        return ctx.shards.gather(rows)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        shards: RowShards = ctx.shards
        if not ctx.alike:
            return shards.reduce_scatter(grads[0].contiguous()), None, None
        return len(shards.sizes) * grads[0][shards.first : shards.first + shards.rows], None, None
