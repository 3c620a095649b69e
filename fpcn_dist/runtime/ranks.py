"""Who am I among the ranks: connect, agree, and leave; :mod:`fpcn_dist.runtime.launchers` reads the environment.

``torchrun``, ``deepspeed``, ``srun`` and plain ``python`` differ only in the environment that they give a process;
everything after :func:`connect` is the same for all of them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from fpcn_dist.runtime.errors import Outage, Preempted, UserError
from fpcn_dist.runtime.launchers import placement
from fpcn_dist.runtime.limits import raise_open_files

CPU = torch.device("cpu")
MEETING_TIMEOUT = datetime.timedelta(seconds=60)
"""How long a rank waits at its start for the others."""
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits inside a collective for others that stand still (a storage that hangs, a suspended machine)
before it gives the run up, unless :data:`PATIENCE` says otherwise. One that has died is noticed at once: its
connections close."""
PATIENCE = "FPCN_RANK_TIMEOUT"
"""Environment variable with that time in seconds."""
FIRST_RANK_TIMEOUT = datetime.timedelta(hours=12)
"""How long ranks wait while the first one does what only one can do (checking a large data set, say)."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run.

    Attributes:
        rank, world_size: global rank and number of ranks.
        local_rank, local_world_size: the same within this machine.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Group of all ranks, or ``None`` where there is only one, so that single-process code does no collectives."""
        return dist.group.WORLD if self.world_size > 1 else None

    def on_first(self, compute: Callable[[], Any]) -> Any:
        """Run ``compute`` on the first rank only and give its JSON-serialisable result to every rank.

        The others wait for up to :data:`FIRST_RANK_TIMEOUT`, far longer than in an ordinary collective.

        Raises:
            UserError, Preempted: on every rank, if ``compute`` raised one on the first.
        """
        if self.world_size == 1:
            return compute()
        global _turn
        key, _turn = f"on_first/{_turn}", _turn + 1
        store = dist.distributed_c10d._get_default_store()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = compute()
            except UserError as error:
                value = None if error.value is None else str(error.value)
                outcome[1] = [type(error).__name__, error.field, value, error.reason, error.hint]
            except Preempted as error:
                outcome[1] = [type(error).__name__, error.signal, error.when]
            store.set(key, "done")
        else:
            store.wait([key], FIRST_RANK_TIMEOUT)
        payload = [json.dumps(outcome)]
        dist.broadcast_object_list(payload, src=0)
        result, failure = json.loads(payload[0])
        if failure is not None:
            kind, *parts = failure
            raise _KINDS.get(kind, UserError)(*parts)
        return result

    def gather(self, items: list[Any]) -> list[Any]:
        """All ranks' ``items``, joined in rank order, on every rank. Collective."""
        if self.world_size == 1:
            return items
        everyone: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(everyone, items)
        return [item for share in everyone for item in share]


_KINDS: dict[str, type[Exception]] = {"Outage": Outage, "Preempted": Preempted}
"""What :meth:`Ranks.on_first` raises on every rank under its own name; all else is a UserError."""
_turn = 0
_PARTING = 1.0
"""Seconds that the end of a group which has lost a rank may take."""


def _device(local_rank: int, local_world_size: int) -> torch.device:
    """The GPU of this rank: its own number, or the only one where its launcher lets each rank see its own alone."""
    if not torch.cuda.is_available():
        return CPU
    gpus = torch.cuda.device_count()
    if gpus == 1:
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise UserError(
            "local ranks",
            local_world_size,
            f"this machine has {gpus} GPU(s), so rank {local_rank} on it has none",
            f"start at most {gpus} processes on each machine",
        )
    return torch.device("cuda", local_rank)


def _require_own_gpus(ranks: Ranks) -> None:
    """Refuse two ranks on one GPU, which NCCL cannot serve. Collective.

    Raises:
        UserError: on every rank.
    """
    if ranks.world_size == 1 or ranks.device.type != "cuda":
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[ranks.device.index or 0 :][:1]
    # A slice of a GPU has a name of its own, and, in some versions of CUDA, the number of the whole GPU.
    name = (
        visible[0]
        if visible and visible[0].startswith("MIG-")
        else str(torch.cuda.get_device_properties(ranks.device).uuid)
    )
    names = ranks.gather([name])
    doubled = next(([r for r, other in enumerate(names) if other == n] for n in names if names.count(n) > 1), None)
    if doubled:
        shown = " and ".join(map(str, doubled[:4]))
        hint = "start at most one process for each GPU of a machine, or let each see its own (srun --gpus-per-task=1)"
        raise UserError("GPU", names[doubled[0]], f"ranks {shown} would share it", hint)


def _own_store() -> Store | None:
    """A part of torchrun's store for this start of the ranks: it outlives them, with the addresses of those that died.

    ``None`` elsewhere, and over several nodes, which count starts each for itself: there torchrun must be told to give
    each start a store of its own (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("LOCAL_WORLD_SIZE") != env.get("WORLD_SIZE"):
        return None
    shared = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    return PrefixStore(f"start-{env['TORCHELASTIC_RESTART_COUNT']}", shared)


def _patience() -> datetime.timedelta:
    written = os.environ.get(PATIENCE)
    if not written:
        return COLLECTIVE_TIMEOUT
    try:
        seconds = datetime.timedelta(seconds=float(written))
    except (ValueError, OverflowError):
        seconds = datetime.timedelta(0)
    if seconds <= datetime.timedelta(0):
        reason = "is no number of seconds that ranks could wait for one another"
        raise UserError(PATIENCE, written, reason, f"set it to {COLLECTIVE_TIMEOUT.total_seconds():.0f}, say")
    return seconds


def _set_timeout(timeout: datetime.timedelta) -> None:
    """Let collectives wait so long from now on, whatever the ranks' meeting was given."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.13
    set_timeout(timeout, dist.group.WORLD)


@contextlib.contextmanager
def connect(store: Store | None = None, *, join: bool = True) -> Iterator[Ranks]:
    """Join the run that the environment describes; leave it at the end of the block.

    A process that no launcher started becomes the only rank of a group of one.

    Args:
        store: where the ranks meet; by default at the address that the environment names.
        join: see :func:`fpcn_dist.runtime.launchers.placement`.

    Raises:
        UserError: no launcher's environment, more local ranks than GPUs, two ranks on one GPU, a rendezvous port in
            use, or no answer from the other ranks.
    """
    global _turn
    _turn = 0  # all ranks count from here, also where a process joins one run after another
    patience = _patience()
    raise_open_files()
    rank, world_size, local_rank, local_world_size = placement(join=join)
    device = _device(local_rank, local_world_size)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if world_size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            store = store or _own_store()
            where: dict[str, Any] = {} if store is None else {"store": store, "rank": rank, "world_size": world_size}
            dist.init_process_group(backend, timeout=MEETING_TIMEOUT, **where)
            _set_timeout(patience)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(
                "MASTER_PORT",
                os.environ.get("MASTER_PORT"),
                f"the rendezvous port of {address} is already in use",
                "start with another --master-port, or stop the run that holds it",
            ) from error
        raise Outage(
            "rendezvous",
            address,
            f"rank {rank} could not reach the other {world_size - 1} rank(s) there",
            "start all ranks with the same MASTER_ADDR and MASTER_PORT, reachable from each of them",
        ) from error
    parting = None
    try:
        ranks = Ranks(rank, world_size, local_rank, local_world_size, device)
        _require_own_gpus(ranks)
        yield ranks
    except RuntimeError:
        parting = _PARTING
        raise
    finally:
        _leave(parting)


def _leave(patience: float | None) -> None:
    """Destroy the group, in the background where that takes longer than ``patience`` seconds.

    It waits for all collectives: after a rank is lost, perhaps for one with a rank that lives, but waits for this one.
    """
    if not dist.is_initialized():
        return
    if patience is None:
        dist.destroy_process_group()
        return
    destruction = threading.Thread(target=dist.destroy_process_group, daemon=True)
    destruction.start()
    destruction.join(patience)


def own_device() -> torch.device:
    """Where a process computes that has been given one GPU, or none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def use_threads(threads: int | None, device: torch.device) -> None:
    """Let a network on the CPU take the threads that the recipe grants a rank (``None``: all of the machine's)."""
    if threads is not None and device.type == "cpu":
        torch.set_num_threads(threads)
