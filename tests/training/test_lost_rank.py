"""Ranks that have lost one leave soon, also where they would wait for one another."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.launching import ROOT, environment, free_port

RANK = """
import datetime, os, signal, sys
import torch, torch.distributed as dist
FIRST, LOST = int(sys.argv[1]), int(sys.argv[2])
from fpcn_dist.runtime import ranks
from fpcn_dist.runtime.preemption import Preemption

ranks.COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)  # whoever waited for it would not leave within the test

with ranks.connect() as ranks, Preemption(ranks) as preemption:
    preemption.agreed()
    dist.barrier()
    if ranks.rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    if ranks.rank == FIRST:
        preemption.agreed()  # which the third does not come to
        dist.recv(torch.ones(1), LOST)
    dist.recv(torch.ones(1), FIRST)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "lost"), [(0, 1), (0, 2)])
def test_survivors_do_not_wait_for_one_another(first, lost):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(first), str(lost)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            env=environment() | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(3)
    ]
    assert ranks[lost].wait(timeout=60) == -9
    assert [rank.wait(timeout=90) for number, rank in enumerate(ranks) if number != lost] == [1, 1]
