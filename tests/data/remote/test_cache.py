"""The cache of remote images: bounded, least recently used first, shared by processes, and never trusted blindly."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fpcn_dist.data.remote.cache import Cache

_ROOM = 1000
"""Bytes of an entry of these tests, with its trailer."""
_CONTENT = bytes(_ROOM - 48)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10 * _ROOM)


def _keys(cache: Cache, among: range) -> set[int]:
    return {i for i in among if cache.path(str(i)).exists()}


def _size(cache: Cache) -> int:
    return sum(file.stat().st_size for file in cache.folder.iterdir() if file.name != "ledger")


def _age(cache: Cache, key: str, seconds: int) -> None:
    """Let an entry have been used so many seconds after the epoch."""
    os.utime(cache.path(key), (seconds, seconds))


def test_what_is_written_is_read_by_its_version_or_its_digest(cache: Cache) -> None:
    digest = hashlib.sha256(b"image").hexdigest()
    assert cache.read("a", "v1", "") is None
    assert cache.write("a", "v1", b"image")
    assert cache.read("a", "v1", "") == b"image"
    assert cache.read("a", "v2", "") is None
    assert cache.read("a", "v2", digest) == b"image"  # a digest says more than a version
    assert cache.read("a", "v1", "0" * 64) is None
    assert cache.write("a", "v2", b"another")
    assert cache.read("a", "v2", "") == b"another"


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: b"x" + whole[1:],
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    ],
    ids=["cut", "empty", "content", "version"],
)
def test_a_damaged_entry_is_none(cache: Cache, damage: Callable[[bytes], bytes]) -> None:
    cache.write("a", "v1", b"image" * 100)
    path = cache.path("a")
    path.write_bytes(damage(path.read_bytes()))
    assert cache.read("a", "v1", "") is None
    assert cache.write("a", "v1", b"image" * 100)
    assert cache.read("a", "v1", "") == b"image" * 100


def test_the_bound_holds_and_what_was_used_last_stays(cache: Cache) -> None:
    for i in range(10):
        assert cache.write(str(i), "", _CONTENT)
        _age(cache, str(i), i)
    assert _size(cache) == cache.limit
    assert cache.read("0", "", "") == _CONTENT  # used now
    assert cache.write("10", "", _CONTENT)
    assert _size(cache) <= cache.limit
    assert _keys(cache, range(11)) == {0, *range(3, 11)}  # a tenth is freed beside the room for the new one


def test_an_entry_that_is_replaced_counts_once(cache: Cache) -> None:
    for _ in range(30):
        assert cache.write("a", "", _CONTENT)
        assert cache.write("b", "", b"small")
    assert int((cache.folder / "ledger").read_text()) == _size(cache)


def test_what_is_larger_than_the_bound_is_not_kept(cache: Cache) -> None:
    cache.write("a", "", _CONTENT)
    assert not cache.write("b", "", bytes(cache.limit))
    assert cache.read("a", "", "") == _CONTENT
    assert not Cache(cache.folder, 0).write("c", "", b"x")


def test_pinned_entries_are_never_evicted(cache: Cache) -> None:
    for i in range(10):
        cache.write(str(i), "", _CONTENT)
        _age(cache, str(i), i)
    pins = [cache.pin(str(i)) for i in range(10)]
    for i in range(10):
        _age(cache, str(i), i)
    assert not cache.write("10", "", _CONTENT)
    assert _keys(cache, range(11)) == set(range(10))
    for pin in pins[5:]:
        assert pin is not None
        os.close(pin)
    assert cache.write("10", "", _CONTENT)
    assert _keys(cache, range(11)) == {*range(5), *range(7, 11)}
    for pin in pins[:5]:
        assert pin is not None
        os.close(pin)


def test_there_is_no_pin_without_an_entry(cache: Cache) -> None:
    assert cache.pin("a") is None


def _fill(folder: Path, first: int) -> None:
    cache = Cache(folder, 10 * _ROOM)
    for i in range(first, first + 100):
        cache.write(str(i), "", _CONTENT)


def test_several_processes_share_one_bound(cache: Cache) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(cache.folder, 100 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert _size(cache) <= cache.limit
    assert int((cache.folder / "ledger").read_text()) == _size(cache)


def test_a_pin_of_another_process_holds_and_ends_with_it(cache: Cache) -> None:
    for i in range(10):
        cache.write(str(i), "", _CONTENT)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        for i in range(10):
            cache.pin(str(i))
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    assert not cache.write("10", "", _CONTENT)
    os.write(done[1], b"x")
    os.waitpid(child, 0)
    assert cache.write("10", "", _CONTENT)
    for end in (*ready, *done):
        os.close(end)


def test_a_lost_ledger_is_counted_anew(cache: Cache) -> None:
    for i in range(10):
        cache.write(str(i), "", _CONTENT)
    for spoilt in (b"", b"\x00\xff", b"-5"):
        (cache.folder / "ledger").write_bytes(spoilt)
        cache.write("0", "", _CONTENT)
        assert int((cache.folder / "ledger").read_text()) == _size(cache)


def test_what_a_killed_process_left_half_written_is_deleted(cache: Cache) -> None:
    cache.write("0", "", _CONTENT)
    left, fresh = cache.folder / "left.1234.tmp", cache.folder / "fresh.1234.tmp"
    left.write_bytes(_CONTENT)
    fresh.write_bytes(b"")
    os.utime(left, (0, 0))
    for i in range(20):
        cache.write(str(i), "", _CONTENT)
    assert not left.exists() and fresh.exists()


def test_a_full_disk_is_said_once_and_what_is_there_is_read(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache.write("a", "", b"image")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert not cache.write("b", "", b"image")
    assert not cache.write("c", "", b"image")
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "data.cache_gib" in said and "No space left on device" in said and str(cache.folder) in said
    assert cache.read("a", "", "") == b"image"
    assert _size(cache) == len(b"image") + 48  # nothing half written is left


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache", 1000)
    assert not cache.write("a", "", b"image")
    assert cache.read("a", "", "") is None and cache.pin("a") is None
    assert "Not a directory" in capfd.readouterr().err
