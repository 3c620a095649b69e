"""Standard output whose reader may leave before all is written, as ``head`` does. Needs the standard library alone."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

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


def discard_output() -> None:
    """Let everything that this process prints from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _reader_has_left(stream: TextIO | None) -> bool:
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
