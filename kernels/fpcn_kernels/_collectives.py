"""Rows of a global batch that is split over ranks, contiguous in rank order and possibly unevenly."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class RowShards:
    """Which rows of the global batch each rank of ``group`` holds. Collective: every rank of the group constructs it.

    Args:
        rows: number of rows of this rank.
        group: the process group, or ``None`` for a single process.
        device: where the group communicates.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.sizes = [rows]
        rank = 0
        if group is not None:
            rank = dist.get_rank(group)
            sizes = torch.empty(dist.get_world_size(group), 1, dtype=torch.int64, device=device)
            dist.all_gather(list(sizes.split(1)), sizes.new_full((1, 1), rows), group=group)
            self.sizes = sizes.flatten().tolist()
        self.first, self.rows, self.total = sum(self.sizes[:rank]), rows, sum(self.sizes)

    def gather(self, rows_BF: Tensor) -> Tensor:
        """Every rank's rows [B, F], in rank order: [N, F]."""
        if self.group is None:
            return rows_BF
        # Equal sizes, by padding: gloo has no others.
        padded_SF = rows_BF.new_zeros(max(self.sizes), rows_BF.shape[1])
        padded_SF[: self.rows] = rows_BF
        shards = [torch.empty_like(padded_SF) for _ in self.sizes]
        dist.all_gather(shards, padded_SF, group=self.group)
        return torch.cat([shard[:size] for shard, size in zip(shards, self.sizes, strict=True)])

    def reduce_scatter(self, rows_NF: Tensor) -> Tensor:
        """The sum over ranks of [N, F], of which each rank gets its own rows [B, F]."""
        if self.group is None:
            return rows_NF
        padded_WSF = rows_NF.new_zeros(len(self.sizes), max(self.sizes), rows_NF.shape[1])
        for padded_SF, shard in zip(padded_WSF, rows_NF.split(self.sizes), strict=True):
            padded_SF[: len(shard)] = shard
        own_SF = torch.empty_like(padded_WSF[0])
        dist.reduce_scatter(own_SF, list(padded_WSF), group=self.group)
        return own_SF[: self.rows]
