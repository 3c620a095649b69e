"""Files are decoded in child processes: one that a decoder dies of, or never ends with, is refused like any other.

Native decoders are written in C and C++, and some damaged file will crash each of them sooner or later. Every child
(:mod:`fpcn_dist.data.index.check.checker`) answers in the order in which it is asked, so that the first question
without an answer names the file that it died of. Another child takes its place, and what was found out about other
files stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import IO, NamedTuple, cast

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.check.copies import Copies
from fpcn_dist.runtime.cores import usable_cores

_SECONDS = 60.0
"""Processor time that the decoding of a file may take."""
_AHEAD = 16
"""Questions that a child holds, so that it need not wait for the next one. They and the answers fit into a pipe."""
_TOO_LONG = (signal.SIGPROF, signal.SIGALRM)


class Check(NamedTuple):
    """What was found out about a file.

    Attributes:
        reason: why it is not usable, or ``None`` where it is.
        digest: SHA-256 of its content in hexadecimal; empty where the file could not be read.
        size: bytes.
    """

    reason: str | None
    digest: str
    size: int

    @property
    def ok(self) -> bool:
        return self.reason is None


class _Question(NamedTuple):
    """A file to look at.

    Attributes:
        index: its place among all.
        blob: where it lies.
        fault: of what a child died that decoded it; it is then read, for its digest, and not decoded any more.
        killed: whether a child was killed that decoded it, not by the decoder (where memory is short, the system does).
    """

    index: int
    blob: Blob
    fault: str | None = None
    killed: bool = False


def check_blobs(
    blobs: Sequence[Blob], decoder: str, max_pixels: int, *, seconds: float = _SECONDS
) -> Generator[tuple[int, Check], None, None]:
    """Read and decode files in one child process per core; gives each one's index with its check, as they come.

    The children end with the iterator, and with this process, whatever ends it.

    Args:
        blobs: images; those of an object store are fetched by this process.
        decoder: import path of a :class:`fpcn_dist.data.index.check.checker.Decoder`.
        max_pixels: files whose header announces more pixels are refused without being decoded.
        seconds: of processor time that the decoding of a file may take.

    Raises:
        RuntimeError: a child cannot be started, or its decoder be imported.
        UserError: an object store cannot be read.
    """
    fresh, again = iter(range(len(blobs))), deque[_Question]()
    count = min(usable_cores(), len(blobs))
    ahead = min(_AHEAD, -(-len(blobs) // max(1, count)))

    def ask(child: _Child) -> None:
        while len(child.asked) < ahead:
            if again:
                child.ask(again.popleft())
            elif (index := next(fresh, None)) is not None:
                child.ask(_Question(index, copies.of(index)))
            else:
                return

    def answer(index: int, check: Check) -> tuple[int, Check]:
        copies.release(index)
        return index, Check(copies.faults[index], "", 0) if index in copies.faults else check

    with Copies(blobs) as copies, contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:

        def start() -> None:
            child = stack.enter_context(contextlib.closing(_Child(decoder, max_pixels, seconds)))
            selector.register(child.answers, selectors.EVENT_READ, child)
            ask(child)

        for _ in range(count):
            start()
        left = len(blobs)
        while left:
            for key, _ in selector.select():
                child = cast("_Child", key.data)
                for index, check in child.receive():
                    left -= 1
                    yield answer(index, check)
                if not child.ended:
                    ask(child)
                    continue
                selector.unregister(child.answers)
                child.close()
                answered, unanswered = child.blame(seconds)
                left -= len(answered)
                yield from (answer(*found) for found in answered)
                again.extendleft(reversed(unanswered))
                start()


class _Child:
    """A child process, and what it was asked and has not answered yet."""

    def __init__(self, decoder: str, max_pixels: int, seconds: float) -> None:
        # As multiprocessing starts its children, but without importing this process's main module once more.
        begin = (
            f"import sys; sys.path[:] = {[str(path) for path in sys.path]!r}; "
            f"from fpcn_dist.data.index.check.checker import main; main({decoder!r}, {max_pixels}, {seconds})"
        )
        # In a session of its own no key of a terminal reaches it; standard input ends with this process.
        self._process = subprocess.Popen(
            [sys.executable, "-c", begin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._questions = cast("IO[bytes]", self._process.stdin)
        self.answers = cast("IO[bytes]", self._process.stdout)
        self.asked = deque[_Question]()
        self.ended, self._ready, self._rest = False, False, b""

    def ask(self, question: _Question) -> None:
        """Add to its questions; where it has died meanwhile, :meth:`receive` will tell."""
        self.asked.append(question)
        with contextlib.suppress(BrokenPipeError):
            self._questions.write(json.dumps((question.blob, question.fault is None)).encode() + b"\n")
            self._questions.flush()

    def receive(self) -> Iterator[tuple[int, Check]]:
        """What it has answered; waits for something, and notes where it has ended."""
        received = os.read(self.answers.fileno(), 1 << 16)
        self.ended = not received
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            if not self._ready:
                self._ready = True
                continue
            question, (reason, digest, size) = self.asked.popleft(), json.loads(line)
            yield question.index, Check(question.fault or reason, digest, size)

    def blame(self, seconds: float) -> tuple[list[tuple[int, Check]], list[_Question]]:
        """After its death: what that answers, and what is to be asked again."""
        status = self._process.returncode
        if not self._ready:
            raise RuntimeError(f"a process that checks files could not start (exit status {status})")
        if not self.asked:
            return [], []
        first, *others = self.asked
        if first.fault is not None:  # not even reading it went well
            return [(first.index, Check(first.fault, "", 0))], others
        if status in (-signal.SIGKILL, -signal.SIGTERM) and not first.killed:
            return [], [first._replace(killed=True), *others]
        fault = f"its decoder dies of it ({signal.Signals(-status).name if status < 0 else f'exit status {status}'})"
        if -status in _TOO_LONG:
            fault = f"decoding it takes longer than {seconds:g} s"
        return [], [first._replace(fault=fault), *others]

    def close(self) -> None:
        """End it, whatever it does."""
        if self._process.returncode is None:
            if not self.ended:
                self._process.kill()
            self._process.wait()
        for pipe in (self._questions, self.answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
