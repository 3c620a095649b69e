"""The child process that looks at files for :mod:`fpcn_dist.data.index.check.checking`, and may die of one.

It reads questions, a line of JSON each: a blob, and whether to decode it. It answers each with another: why the image
cannot be used, its digest, its bytes. It imports no torch, unless its decoder does: started for three files, it must
cost less than they do.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import pkgutil
import resource
import signal
import sys
from typing import Protocol

from fpcn_dist.data.blob import Blob

WALL = 10
"""How many seconds may pass for each second of processor time that the decoding of a file may take."""
_BYTES, _BYTES_PER_PIXEL = 64 << 20, 16
"""No image has more bytes than so many, and for each pixel so many more (four channels of 32 bits)."""
_MEMORY, _MEMORY_PER_PIXEL = 1 << 30, 40
"""Bytes that decoding may take, and for each pixel more: the file, the decoded channels and what they become."""

_PR_SET_PDEATHSIG = 1


class Decoder(Protocol):
    """Decodes one image at a time, as the training does on the CPU; one instance per thread."""

    def fault(self, data: bytes, max_pixels: int) -> str | None:
        """Why an image file cannot be used, or ``None`` where it can; it is decoded to find out.

        The number of pixels is read from the header, and nothing is decoded where it exceeds ``max_pixels``.
        """
        ...


def main(decoder: str, max_pixels: int, seconds: float) -> None:
    """Answer the questions of standard input until it ends, as it does with the process that asks.

    Args:
        decoder: import path of the class of the :class:`Decoder`, as "package.module:Class".
        max_pixels: see there.
        seconds: of processor time that the decoding of a file may take; it then ends this process, as do ten times
            as many by the clock. Signals do that, which native code cannot keep waiting.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # of a terminal or a batch system, to all processes
        signal.signal(number, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 1)  # no core file; and none to a handler either, which 0 would not keep from it
    _limit(resource.RLIMIT_DATA, _MEMORY + _MEMORY_PER_PIXEL * max_pixels)
    _end_with_parent()
    look = pkgutil.resolve_name(decoder)()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What libraries print of a damaged file is none of its answers, and its refusal says it to users.
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    print("ready", file=answers, flush=True)
    for question in sys.stdin:
        blob, decode = json.loads(question)
        answer = _answer(Blob.from_list(blob), look if decode else None, max_pixels, seconds)
        print(json.dumps(answer), file=answers, flush=True)


def _end_with_parent() -> None:
    """Let the system kill this process when its parent dies, where it can (Linux), whatever a decoder is doing then.

    Elsewhere it ends with the file that it is looking at, at the latest after the time that this may take.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(what: int, most: int) -> None:
    """Let this process have no more of something, where the system knows such a limit."""
    with contextlib.suppress(ValueError, OSError):  # a limit that is lower already cannot be raised
        resource.setrlimit(what, (most, most))


def _answer(blob: Blob, decoder: Decoder | None, max_pixels: int, seconds: float) -> tuple[str | None, str, int]:
    """Why a file cannot be used, its SHA-256, and its bytes; it is not decoded where there is no decoder."""
    try:
        size = os.stat(blob.path).st_size - blob.offset if blob.size is None else blob.size
        if size > _BYTES + _BYTES_PER_PIXEL * max_pixels:
            return f"its {size:,} bytes are more than any image of data.max_pixels {max_pixels:,} has", "", 0
        data = blob.read()
    except OSError as error:
        return f"cannot be read ({error.strerror})", "", 0
    digest = hashlib.sha256(data).hexdigest()
    if decoder is None:
        return None, digest, len(data)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL * seconds)
    try:
        reason = decoder.fault(data, max_pixels)
    except MemoryError:
        reason = "decoding it takes too much memory"
    except Exception as error:  # whatever a parser stumbles over is the file's fault
        reason = f"its decoder fails ({type(error).__name__})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return reason, digest, len(data)
