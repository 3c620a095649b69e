"""Standard output whose reader may leave before all is written, as ``head`` does. Needs the standard library alone.

A command that only says something ends then; one that computes for hours goes on, and keeps a log of what it says.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fpcn_dist.runtime.errors import Preempted, UserError
from fpcn_dist.runtime.names import ESCAPE

STATUS = 128 + signal.SIGPIPE
"""Exit status by which a shell knows a command whose reader has left."""


@contextlib.contextmanager
def quiet_without_reader() -> Iterator[None]:
    """End this process with :data:`STATUS`, and without a traceback, if nobody reads its output any more.

    What the encoding of a stream lacks is escaped, and is no error. The output is flushed at the end of the block,
    because an error in the interpreter's own flush cannot be caught.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)
    try:
        try:
            yield
        except SystemExit as leaving:
            if isinstance(leaving.__context__, BrokenPipeError):  # rich has turned the one into the other
                os._exit(STATUS)
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not (_reader_has_left(sys.__stdout__) or _reader_has_left(sys.__stderr__)):
            raise  # the pipe was another one
        os._exit(STATUS)


class Log:
    """The file that keeps what a run says, whoever listens; control sequences of terminals are left out.

    What is said before :meth:`begin` is kept until then: a run that is refused leaves nothing. A file that cannot be
    written to ends no run.
    """

    def __init__(self) -> None:
        self._early: list[str] | None = []
        self._file: TextIO | None = None

    def write(self, text: str) -> None:
        if _DRAWN.search(text):  # a bar that is drawn anew
            return
        text = _CONTROL.sub("", text)
        if self._early is not None:
            self._early.append(text)
        elif self._file is not None:
            with contextlib.suppress(OSError, ValueError):
                self._file.write(text)

    def begin(self, path: Path) -> None:
        """Append to ``path`` from now on, one that is there already included."""
        early, self._early = self._early or [], None
        with contextlib.suppress(OSError):
            # Line by line, so that it can be followed, and a killed run has said all.
            self._file = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
            self.write("".join([f"\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {shlex.join(sys.argv)}\n", *early]))

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


_DRAWN, _CONTROL = re.compile(r"\x1b\[(\d*A|\d*K|\?25[lh])"), re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\x07")


class Outlived:
    """A text stream whose reader may leave, which then takes everything and shows nothing; and a log beside it.

    What its encoding has no letters for is written with escapes.

    Args:
        stream: what is written to; ``None``, as where a process was started with its output closed.
        log: what is written to as well.
    """

    def __init__(self, stream: TextIO | None, log: Log | None = None) -> None:
        self._stream, self.log = stream, log

    @property
    def unlogged(self) -> Outlived:
        """The same stream without its log."""
        return Outlived(self._stream)

    def write(self, text: str) -> int:
        if self.log is not None:
            self.log.write(text)
        if self._stream is not None:
            with self._reader_may_leave():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding or "ascii"
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._reader_may_leave():
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _reader_may_leave(self) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError):  # a pipe or terminal that is closed, a full disk; a stream that was closed
            stream, self._stream = self._stream, None
            # What is in its buffer would fail again when the interpreter ends.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())  # pyright: ignore[reportOptionalMemberAccess]
                os.close(nowhere)


@contextlib.contextmanager
def outliving_readers(log: Log | None = None) -> Iterator[None]:
    """Let what this process says be a courtesy: it goes on in silence when a pipe, a terminal or a connection closes.

    SIGHUP, by which a terminal that is closed ends what it has started, is ignored. Where the block ends with an error,
    the log says so last.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Outlived(before[0], log), Outlived(before[1], log)
    main = threading.current_thread() is threading.main_thread()
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN) if main else None
    try:
        yield
    except BaseException as error:
        if log is not None:
            log.write(_explain(error))
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
        if main:
            signal.signal(signal.SIGHUP, hangup if hangup is not None else signal.SIG_DFL)
        if log is not None:
            log.close()


def _explain(error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"error: {error}\n"
    if isinstance(error, (Preempted, KeyboardInterrupt, SystemExit)):
        return f"{str(error) or type(error).__name__}\n"
    return "".join(traceback.format_exception(error))


def _reader_has_left(stream: TextIO | None) -> bool:
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
