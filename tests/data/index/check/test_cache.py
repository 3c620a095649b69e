"""What is remembered of checks survives kills, damage and company; what is not sure is forgotten."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fpcn_dist.data.index.check import cache
from fpcn_dist.data.index.check.cache import CheckCache
from fpcn_dist.data.index.check.checking import Check

GOOD, BAD = Check(None, "d" * 64, 5), Check("it is bad", "e" * 64, 6)
STATE = (5, 1_700_000_000_123_456_789)


def _note(file: Path, checks: dict[str, Check], key: str = "key") -> CheckCache:
    memory = CheckCache(file, key)
    for name, check in checks.items():
        memory.note(name, STATE, check)
    return memory


def _recall(file: Path, *names: str, key: str = "key") -> list[Check | None]:
    memory = CheckCache(file, key)
    return [memory.recall(name, STATE) for name in names]


def test_checks_are_remembered_for_the_same_state_and_key_alone(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "cache.json"
    _note(file, {"a": GOOD, "b": BAD}).close()
    assert _recall(file, "a", "b", "c") == [GOOD, BAD, None]
    memory = CheckCache(file, "key")
    assert [memory.recall("a", state) for state in [None, (6, STATE[1]), (5, STATE[1] + 1)]] == [None] * 3
    assert _recall(file, "a", key="another") == [None]


def test_what_could_not_be_read_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    _note(file, {"a": Check("cannot be read (Stale file handle)", "", 0), "b": GOOD}).close()
    assert _recall(file, "a", "b") == [None, GOOD]


def test_a_killed_check_has_written_what_is_older_than_some_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, clock = tmp_path / "cache.json", iter([0.0, 1.0, 5.1, 5.1, 6.0, 7.0])
    monkeypatch.setattr(cache.time, "monotonic", lambda: next(clock))
    _note(file, {"a": GOOD, "b": BAD, "c": GOOD})  # and no close
    monkeypatch.undo()
    assert _recall(file, "a", "b", "c") == [GOOD, BAD, None]


def _append(file: Path, checks: dict[str, Check], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process leaves that is killed after it wrote a line for each check."""
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_EVERY", -1.0)
        _note(file, checks)


def test_a_file_that_grew_by_lines_becomes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache.json"
    _append(file, {"a": GOOD, "b": GOOD, "c": GOOD}, monkeypatch)
    _append(file, {"b": BAD}, monkeypatch)  # which has changed since
    assert _recall(file, "a", "b", "c") == [GOOD, BAD, GOOD]
    _note(file, {"d": BAD}).close()
    assert set(json.loads(file.read_text())["files"]) == {"a", "b", "c", "d"}
    assert _recall(file, "a", "b", "c", "d") == [GOOD, BAD, GOOD, BAD]


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_line_that_was_cut_short_spoils_no_other(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache.json"
    _append(file, {"a": GOOD, "b": GOOD}, monkeypatch)
    file.write_bytes(file.read_bytes()[: -1 - cut])
    _append(file, {"c": BAD}, monkeypatch)
    assert _recall(file, "a", "b", "c") == [GOOD, None, BAD]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"key": 1}',
        b'{"key": "key", "files": 3}',
        b'{"key": "key", "files": {"a": 3}}',
        b"\xff\x00\n",
    ],
)
def test_a_damaged_file_is_replaced(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    file.write_bytes(content)
    assert _recall(file, "a") == [None]
    _note(file, {"a": GOOD}).close()
    assert set(json.loads(file.read_text())["files"]) == {"a"}


def test_what_others_found_meanwhile_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    first, second = _note(file, {"a": GOOD}), _note(file, {"b": BAD})
    first.close()
    second.close()
    assert _recall(file, "a", "b") == [GOOD, BAD]


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    _append(tmp_path / "file" / "cache.json", {"a": GOOD}, monkeypatch)
    _note(tmp_path / "file" / "cache.json", {"a": GOOD}).close()


def test_processes_at_once_lose_nothing_that_stays(tmp_path: Path) -> None:
    """Lines of several writers do not tear each other."""
    file = tmp_path / "cache.json"
    script = (
        "import sys; from pathlib import Path; from fpcn_dist.data.index.check import cache\n"
        "from fpcn_dist.data.index.check.checking import Check\n"
        "cache._EVERY = -1.0\n"
        "memory = cache.CheckCache(Path(sys.argv[1]), 'key')\n"
        "for i in range(400): memory.note(sys.argv[2] + str(i), (1, 2), Check(None, 'd' * 64, i))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, file, name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    memory = CheckCache(file, "key")
    for name in "ab":
        for i in range(400):
            assert memory.recall(f"{name}{i}", (1, 2)) == Check(None, "d" * 64, i)
