"""How processes find their GPUs and each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fpcn_dist.runtime import ranks
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.ranks import Ranks

_ROOT = Path(__file__).parents[2]


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("gpus", "local_rank", "device"), [(0, 3, "cpu"), (4, 3, "cuda:3"), (1, 0, "cuda:0")])
def test_a_rank_takes_the_gpu_of_its_number(monkeypatch, gpus, local_rank, device):
    see_gpus(monkeypatch, gpus)
    assert ranks._device(local_rank, 4) == torch.device(device)


def test_a_rank_that_sees_one_gpu_takes_it(monkeypatch):
    """As under ``srun --gpus-per-task=1``, where every task calls its own one cuda:0."""
    see_gpus(monkeypatch, 1)
    assert ranks._device(1, 2) == torch.device("cuda", 0)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    see_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match=r"local ranks 3: this machine has 2 GPU\(s\), so rank 2 on it has none"):
        ranks._device(2, 3)


@pytest.mark.parametrize(
    ("visible", "uuids", "message"),
    [
        ("", ["a", "b", "c"], None),
        ("", ["a", "b", "a"], "GPU a: ranks 0 and 2 would share it; start at most one process for each GPU"),
        ("MIG-1", ["MIG-1", "MIG-1", "a"], "GPU MIG-1: ranks 0 and 1 would share it"),
        ("MIG-1", ["MIG-1", "MIG-2", "a"], None),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_by_its_name(monkeypatch, visible, uuids, message):
    """However each of them calls it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    gathered = []
    monkeypatch.setattr(Ranks, "gather", lambda self, items: gathered.append(items) or uuids)
    here = Ranks(0, 3, 0, 3, torch.device("cuda", 0))
    if message is None:
        ranks._require_own_gpus(here)
    else:
        with pytest.raises(UserError) as error:
            ranks._require_own_gpus(here)
        assert str(error.value).startswith(message)
    assert gathered == [[uuids[0]]]


def test_processes_of_mpirun_meet():
    """The same way, on a port that they agree on, as ranks of any other launcher."""
    script = "from fpcn_dist.runtime.ranks import connect\nwith connect() as ranks: print(ranks.gather([ranks.rank]))"
    started = []
    for rank in ("0", "1"):
        variables = {f"OMPI_COMM_WORLD_{name}": rank for name in ("RANK", "LOCAL_RANK")}
        variables |= {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
        environment = {**os.environ, **variables, "PYTHONPATH": f"{_ROOT}:{_ROOT / 'kernels'}"}
        argv = [sys.executable, "-c", script]
        started.append(subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True))
    assert [process.communicate(timeout=100)[0].strip() for process in started] == ["[0, 1]", "[0, 1]"]
