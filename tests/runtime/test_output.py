"""Output that a computation outlives, and the log that it leaves."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

import pytest

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.output import Log, Outlived, outliving_readers


class Broken(io.StringIO):
    """A stream that fails in one way."""

    def __init__(self, error: int) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EIO, errno.EBADF, errno.ENOSPC])
def test_what_cannot_be_shown_is_dropped_and_logged(tmp_path, error):
    log = Log()
    log.begin(tmp_path / "log.txt")
    stream = Outlived(Broken(error), log)
    assert stream.write("first\n") == 6 and stream.write("second\n") == 7
    stream.flush()
    log.close()
    assert (tmp_path / "log.txt").read_text().endswith("first\nsecond\n")


def test_a_process_without_output_may_print(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with outliving_readers():
        print("a line")
        assert not sys.stdout.isatty()


def test_letters_that_the_output_does_not_know_are_escaped():
    written = io.BytesIO()
    stream = Outlived(io.TextIOWrapper(written, encoding="ascii"))
    stream.write("größe 岩 \udce4\n")
    stream.flush()
    assert written.getvalue() == b"gr\\xf6\\xdfe \\u5ca9 \\udce4\n"


def test_a_terminal_that_is_closed_ends_nothing():
    before = signal.getsignal(signal.SIGHUP)
    with outliving_readers():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == before


def test_the_log_begins_when_the_run_does_and_ends_with_its_error(tmp_path, capsys):
    path = tmp_path / "log.txt"
    log = Log()
    with pytest.raises(UserError), outliving_readers(log):
        print("early \x1b[31mred\x1b[0m größe")
        print("\x1b[2K a bar \x1b[1A", end="")
        assert not path.exists()
        log.begin(path)
        print("late")
        raise UserError("field", "value", "reason", "hint")
    assert path.read_text(encoding="utf-8").splitlines()[2:] == [
        "early red größe",
        "late",
        "error: field value: reason; hint",
    ]
    assert "late\n" in capsys.readouterr().out


def test_a_run_that_is_refused_leaves_no_log(tmp_path):
    with pytest.raises(UserError), outliving_readers(Log()):
        raise UserError("field", "value", "reason", "hint")
    assert list(tmp_path.iterdir()) == []
