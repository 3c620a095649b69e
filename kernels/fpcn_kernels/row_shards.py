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
        device: where the rows are.

    Attributes:
        sizes: rows of each rank.
        first: global index of this rank's first row.
        rows, total: rows of this rank, and of all.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.sizes = [rows]
        rank = 0
        if group is not None:
            rank = dist.get_rank(group)
            # The host needs these numbers. Where the group also has a CPU backend they do not pass through the GPU,
            # whose queue the host would otherwise have to wait for.
            device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device
            sizes = torch.empty(dist.get_world_size(group), 1, dtype=torch.int64, device=device)
            dist.all_gather(list(sizes.split(1)), sizes.new_full((1, 1), rows), group=group)
            self.sizes = sizes.flatten().tolist()
        self.first, self.rows, self.total = sum(self.sizes[:rank]), rows, sum(self.sizes)

    def gather(self, rows: Tensor) -> Tensor:
        """Every rank's rows [B, ...], in rank order: [N, ...]."""
        if self.group is None:
            return rows
        # Equal sizes, by padding: gloo has no others.
        padded = rows.new_zeros(max(self.sizes), *rows.shape[1:])
        padded[: self.rows] = rows
        shards = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(shards, padded, group=self.group)
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
