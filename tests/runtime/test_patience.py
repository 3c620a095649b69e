"""How long ranks wait for one that stands still."""

from __future__ import annotations

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist

from fpcn_dist.runtime import ranks
from fpcn_dist.runtime.errors import UserError
from tests.helpers.forked import start_ranks
from tests.helpers.launching import free_port


def join_on_a_rank(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), ranks.PATIENCE: "1"}
    with pytest.raises(RuntimeError), ranks.connect() as joined:
        assert joined.gather([rank]) == [0, 1]
        if rank == 1:
            time.sleep(4)
        dist.all_reduce(torch.ones(1))
        if rank == 1:  # the first has left, or is about to
            dist.all_reduce(torch.ones(1))


def test_a_collective_waits_as_long_as_the_environment_says():
    start_ranks(join_on_a_rank, free_port(), ranks=2)


def test_by_default_it_waits_longer_than_a_storage_hangs(monkeypatch):
    monkeypatch.delenv(ranks.PATIENCE, raising=False)
    assert ranks._patience() >= datetime.timedelta(minutes=10)
    monkeypatch.setenv(ranks.PATIENCE, "90")
    assert ranks._patience() == datetime.timedelta(seconds=90)


@pytest.mark.parametrize("written", ["0", "-1", "ten minutes", "nan", "inf"])
def test_a_patience_that_is_no_time_is_refused(monkeypatch, written):
    monkeypatch.setenv(ranks.PATIENCE, written)
    with pytest.raises(UserError, match=f"FPCN_RANK_TIMEOUT {written}: is no number of seconds"), ranks.connect():
        pass
