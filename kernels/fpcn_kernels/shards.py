"""Rows of a global batch that is split over ranks, contiguous in rank order and possibly unevenly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class PassingRows(NamedTuple):
    """Rows that pass by this rank, and where their gradients are summed."""

    first: int
    """Global index of the first of them."""
    rows: Tensor
    gradients: Tensor | None


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
        self.rank = 0
        if group is not None:
            self.rank = dist.get_rank(group)
            # The host needs these numbers. Where the group also has a CPU backend they do not pass through the GPU,
            # whose queue the host would otherwise have to wait for.
            device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device
            sizes = torch.empty(dist.get_world_size(group), 1, dtype=torch.int64, device=device)
            dist.all_gather(list(sizes.split(1)), sizes.new_full((1, 1), rows), group=group)
            self.sizes = sizes.flatten().tolist()
        self.first, self.rows, self.total = sum(self.sizes[: self.rank]), rows, sum(self.sizes)

    def gather(self, rows: Tensor) -> Tensor:
        """Every rank's rows [B, ...], in rank order: [N, ...]."""
        if self.group is None:
            return rows
        padded = self._padded(rows)
        shards = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(shards, padded, group=self.group)
        return torch.cat([shard[:size] for shard, size in zip(shards, self.sizes, strict=True)])

    def reduce_scatter(self, rows_NF: Tensor) -> Tensor:
        """The sum over ranks of [N, F], of which each rank gets its own rows [B, F]."""
        if self.group is None:
            return rows_NF
        padded = [self._padded(shard) for shard in rows_NF.split(self.sizes)]
        own_SF = torch.empty_like(padded[0])
        dist.reduce_scatter(own_SF, padded, group=self.group)
        return own_SF[: self.rows]

    def _padded(self, rows: Tensor) -> Tensor:
        """Equal sizes, by padding: gloo has no others."""
        padded = rows.new_zeros(max(self.sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        return padded


class RowExchange:
    """Shows every rank's rows [B, F] to every rank, and brings home what the ranks add to their gradients.

    Iterate once, over all ranks' rows; then :attr:`gradients` [B, F] is the sum over ranks for this rank's rows. In one
    piece the rows are all-gathered and their gradients reduce-scattered. In a ring each rank's rows travel from rank to
    rank, the next ones while these are worked on, and their gradients follow one step behind: no rank ever holds more
    than the rows of three ranks and the gradients of two.
    """

    def __init__(self, shards: RowShards, rows_BF: Tensor, *, with_gradients: bool, ring: bool) -> None:
        self._shards, self._rows_BF, self._with_gradients = shards, rows_BF, with_gradients
        self._ring = ring and len(shards.sizes) > 1
        self.gradients: Tensor | None = None

    def __iter__(self) -> Iterator[PassingRows]:
        return self._pass_round() if self._ring else self._all_at_once()

    def _all_at_once(self) -> Iterator[PassingRows]:
        rows_NF = self._shards.gather(self._rows_BF)
        gradients_NF = torch.zeros_like(rows_NF) if self._with_gradients else None
        yield PassingRows(0, rows_NF, gradients_NF)
        if gradients_NF is not None:
            self.gradients = self._shards.reduce_scatter(gradients_NF)

    def _pass_round(self) -> Iterator[PassingRows]:
        sizes, rank = self._shards.sizes, self._shards.rank
        rows_SF = self._shards._padded(self._rows_BF)
        gradients_move = None
        for step in range(len(sizes)):
            owner = (rank - step) % len(sizes)
            is_last = step == len(sizes) - 1
            rows_move = None if is_last else _Move(self._shards, rows_SF)
            gradients_SF = torch.zeros_like(rows_SF) if self._with_gradients else None
            yield PassingRows(
                sum(sizes[:owner]),
                rows_SF[: sizes[owner]],
                None if gradients_SF is None else gradients_SF[: sizes[owner]],
            )
            if rows_move is not None:
                rows_SF = rows_move.arrived()
            if gradients_SF is not None:
                # What the ranks before this one have added to the gradients of these rows.
                if gradients_move is not None:
                    gradients_SF += gradients_move.arrived()
                gradients_move = _Move(self._shards, gradients_SF)
        if gradients_move is not None:
            self.gradients = gradients_move.arrived()[: self._shards.rows]


class _Move:
    """Sends a tensor to the next rank of the ring while one of the same shape arrives from the rank before."""

    def __init__(self, shards: RowShards, sent: Tensor) -> None:
        assert shards.group is not None
        world_size = len(shards.sizes)
        after, before = (
            dist.get_global_rank(shards.group, (shards.rank + step) % world_size) for step in (1, world_size - 1)
        )
        self._sent, self._arriving = sent, torch.empty_like(sent)
        self._requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, after, group=shards.group),
                dist.P2POp(dist.irecv, self._arriving, before, group=shards.group),
            ]
        )

    def arrived(self) -> Tensor:
        for request in self._requests:
            request.wait()
        return self._arriving
