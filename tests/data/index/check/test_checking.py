"""Checking files in children that may die: each death is its file's alone, and nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.check import checking
from fpcn_dist.data.index.check.checking import Check, check_blobs
from tests.helpers.irregular import REASONS, make_irregular

DEADLY = "tests.helpers.deadly:Decoder"


def _check(folder: Path, texts: list[str], seconds: float = 60.0) -> list[Check]:
    """The checks of files with these texts, in order."""
    paths = [folder / f"{i}.jpg" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    found = dict(check_blobs(Blob.of_files(paths), DEADLY, 10**6, seconds=seconds))
    return [found[i] for i in range(len(paths))]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("read_null", "its decoder dies of it (SIGSEGV)"),
        ("kill SIGABRT", "its decoder dies of it (SIGABRT)"),
        ("kill SIGKILL", "its decoder dies of it (SIGKILL)"),
        ("exit 3", "its decoder dies of it (exit status 3)"),
        ("raise", "its decoder fails (ValueError)"),
        ("swell", "decoding it takes too much memory"),
        ("bad", "it is bad"),
    ],
)
def test_what_a_decoder_does_is_the_files_own_fault(text: str, reason: str, tmp_path: Path) -> None:
    good, bad, last = _check(tmp_path, ["good", text, "good"])
    assert good.ok and last.ok
    # With its content known, it is remembered as other refused files are.
    assert bad == Check(reason, hashlib.sha256(text.encode()).hexdigest(), len(text))


@pytest.mark.parametrize("text", ["spin", "sleep"])
def test_a_decoder_that_does_not_end_is_ended(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = _check(tmp_path, ["good", text, "good"], seconds=0.2)
    assert [check.reason for check in checks] == [None, "decoding it takes longer than 0.2 s", None]


def test_many_deaths_cost_no_other_file_its_check(tmp_path: Path) -> None:
    texts = ["kill SIGSEGV" if i % 7 == 3 else "bad" if i % 5 == 0 else f"good {i}" for i in range(60)]
    checks = _check(tmp_path, texts)
    reasons = {"kill": "its decoder dies of it (SIGSEGV)", "bad": "it is bad", "good": None}
    assert [check.reason for check in checks] == [reasons[text.split()[0]] for text in texts]
    assert [check.digest for check in checks] == [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def test_a_child_that_was_killed_from_outside_blames_no_file(tmp_path: Path) -> None:
    checks = _check(tmp_path, ["good", f"killed_once {tmp_path / 'witness'}", "good"])
    assert all(check.ok for check in checks)


def test_what_decoders_print_disturbs_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert all(check.ok for check in _check(tmp_path, ["print", "good"]))
    assert capfd.readouterr() == ("", "")


def test_a_decoder_that_cannot_be_made_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_text("good")
    with pytest.raises(RuntimeError, match="could not start"):
        list(check_blobs([Blob(str(tmp_path / "a.jpg"))], "tests.helpers.deadly:Nothing", 1))
    assert "Nothing" in capfd.readouterr().err


def test_nothing_to_check_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_Child", None)
    assert list(check_blobs([], DEADLY, 1)) == []


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    make_irregular(tmp_path)
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(1 << 40)
    much = "its 1,099,511,627,776 bytes are more than any image of data.max_pixels 1,000,000 has"
    reasons = {**REASONS, "folder.jpg": "cannot be read (Is a directory)", "sparse.jpg": much}
    found = dict(check_blobs(Blob.of_files(tmp_path / name for name in reasons), DEADLY, 10**6))
    assert {name: found[i].reason for i, name in enumerate(reasons)} == reasons


@pytest.mark.parametrize("name", [b"not \xff utf-8.jpg", b"two\nlines.jpg", b"n" * 250 + b".jpg"])
def test_any_name_can_be_asked_for(name: bytes, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "w") as file:
        file.write("good")
    assert [check.ok for _, check in check_blobs([Blob(os.fsdecode(path))], DEADLY, 1)] == [True]


_PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.check.checking import check_blobs
for _ in check_blobs([Blob(path) for path in sys.argv[1:]], "tests.helpers.deadly:Decoder", 1):
    print("answered", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    """Neither one that waits for a question nor, for longer than a file may take, one that a decoder keeps busy."""
    (tmp_path / "a.jpg").write_text("good")
    (tmp_path / "b.jpg").write_text("sleep")
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, tmp_path / "a.jpg", tmp_path / "b.jpg"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None and parent.stdout.readline() == "answered\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.send_signal(number)
    parent.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        child.kill()
    assert not alive
