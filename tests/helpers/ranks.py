"""Ranks of a test: processes that are forked from one in which everything is imported."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

_IMPORTED = ["fpcn_dist.training.loop", "timm", "torchvision", "torch._dynamo"]
"""What nearly all ranks need, and each would take five seconds of processor time to import."""


def start_ranks(main: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """Call ``main(rank, *arguments)`` in as many processes, which have computed nothing before; wait for their end.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them has failed.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    start_processes(main, arguments, nprocs=ranks, start_method="forkserver")
