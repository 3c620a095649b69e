"""Sums and gathers over ranks, on the device of their argument.

``group=None`` means this process alone: nothing is sent, and no process group is needed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
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
    return rows if group is None else _AllGather.apply(rows, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: Group) -> Tensor:
        sizes = _row_counts(len(rows), rows.device, group)
        rank = dist.get_rank(group)
        ctx.start, ctx.length, ctx.ranks = sum(sizes[:rank]), sizes[rank], len(sizes)
        longest = max(sizes)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(len(sizes) * longest, *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered.split(longest), sizes, strict=True)])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return ctx.ranks * grad[ctx.start : ctx.start + ctx.length], None


def _row_counts(count: int, device: torch.device, group: Group) -> list[int]:
    # The host needs these numbers. Where the group also has a CPU backend they never pass through the GPU, whose queue
    # the host would otherwise have to wait for.
    device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device
    counts = torch.empty(world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.full((1,), count, device=device), group=group)
    return counts.tolist()
