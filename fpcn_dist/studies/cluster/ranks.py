"""Processes that Ray placed somewhere, as ranks of one run: where they meet, where their output goes."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
from collections.abc import Iterator

from torch._C._distributed_c10d import TCPStore

from fpcn_dist.runtime.ranks import Ranks, connect

_PATIENCE = datetime.timedelta(minutes=10)
"""How long ranks wait for one another to start: a node may have to load its libraries over a network."""


class Rendezvous:
    """A place where the ranks of one run meet; the first rank keeps it.

    The system gives it a port when it is opened, so no two runs on a node can be given the same.

    Args:
        host: address of this node.
    """

    def __init__(self, host: str) -> None:
        # For any number of workers: nobody is waited for here.
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
        self.address = f"{host}:{self.store.port}"


@contextlib.contextmanager
def join(rank: int, world_size: int, meeting: Rendezvous | str) -> Iterator[Ranks]:
    """Be one of the ranks for the length of the block.

    Args:
        rank, world_size: this process among them.
        meeting: on the first rank its :class:`Rendezvous`, elsewhere the address of that.

    Raises:
        UserError: the others cannot be reached.
    """
    host, _, port = (meeting if isinstance(meeting, str) else meeting.address).rpartition(":")
    # Ray shows each process its own GPU and no other: for torch it is the first of one.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
    if isinstance(meeting, Rendezvous):
        store = meeting.store
    else:
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_PATIENCE)
    with connect(store) as ranks:
        yield ranks


def describe_rank(rank: int, world_size: int, node: str) -> str:
    """A line for the log that tells which rank this process is, and where it runs."""
    return f"rank {rank} of {world_size}: process {os.getpid()} on {socket.gethostname()}, Ray node {node}"


def write_output_to(log: str) -> None:
    """Append all further output of this process to the file ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
