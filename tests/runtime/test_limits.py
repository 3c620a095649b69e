"""What a machine is short of is said before the work."""

from __future__ import annotations

import resource
import shutil
import tempfile

import pytest

from fpcn_dist.runtime import limits
from fpcn_dist.runtime.limits import GIB, MIB, raise_open_files, shortages


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with enough of everything, whatever this one has."""
    usage = shutil.disk_usage("/")._replace(total=8 * GIB, free=8 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(limits, "raise_open_files", lambda: 65536)
    return monkeypatch


def _disk(machine: pytest.MonkeyPatch, folder: str, **sizes: int) -> None:
    usual = shutil.disk_usage
    machine.setattr(shutil, "disk_usage", lambda path: usual(path)._replace(**sizes if str(path) == folder else {}))


@pytest.mark.usefixtures("machine")
def test_a_machine_with_enough() -> None:
    assert list(shortages(shared=True)) == []


def test_few_open_files(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(limits, "raise_open_files", lambda: 256)
    (short,) = shortages(shared=False)
    assert str(short) == (
        "open files: a process may have 256; allow at least 1024 (ulimit -n; docker run --ulimit nofile=65536)"
    )
    machine.setattr(limits, "raise_open_files", lambda: resource.RLIM_INFINITY)
    assert list(shortages(shared=False)) == []


def test_little_shared_memory_matters_where_it_is_used(machine: pytest.MonkeyPatch) -> None:
    _disk(machine, "/dev/shm", total=64 * MIB)
    (short,) = shortages(shared=True)
    assert "/dev/shm has 0.06 GiB" in str(short) and "--shm-size" in short.hint
    assert list(shortages(shared=False)) == []


def test_no_room_for_temporary_files(machine: pytest.MonkeyPatch) -> None:
    _disk(machine, tempfile.gettempdir(), free=3 * MIB)
    (short,) = shortages(shared=False)
    assert str(short).startswith(f"temporary files: {tempfile.gettempdir()} has 3 MiB free; free some space there")

    def nowhere() -> str:
        raise FileNotFoundError("no usable temporary directory")

    machine.setattr(tempfile, "gettempdir", nowhere)
    assert [short.hint for short in shortages(shared=False)] == ["set TMPDIR to one"]


def test_as_many_open_files_as_this_process_may_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: asked.append(limit))
    assert raise_open_files() == 4096 and asked == [(4096, 4096)]

    def refuse(which: int, limit: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_open_files() == 256
