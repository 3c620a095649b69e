"""What a machine may have too little of for its work: open files, shared memory, room for temporary files.

Each of these ends a training in its middle, with a message that names none of them, so it is said before the work.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

MIB, GIB = 2**20, 2**30
_OPEN_FILES = 1024
"""A rank opens sockets to others, files of a bank, and images that are read ahead."""
_TEMPORARY = 256 * MIB
_SHARED = GIB
_SHARED_FOLDER = "/dev/shm"


class Shortage(NamedTuple):
    """One of these limits.

    Attributes:
        name: of what is short.
        found: how much there is.
        hint: what to do about it.
    """

    name: str
    found: str
    hint: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}; {self.hint}"


def raise_open_files() -> int:
    """Let this process open as many files as it is allowed to ask for; gives that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft


def shortages(*, shared: bool) -> Iterator[Shortage]:
    """What this machine is short of.

    Args:
        shared: whether its processes exchange data through shared memory, as NCCL and Ray do.
    """
    if 0 <= (files := raise_open_files()) < _OPEN_FILES:
        hint = f"allow at least {_OPEN_FILES} (ulimit -n; docker run --ulimit nofile=65536)"
        yield Shortage("open files", f"a process may have {files}", hint)
    if shared and (size := shutil.disk_usage(_SHARED_FOLDER).total) < _SHARED:
        hint = "give NCCL and Ray at least 1 GiB (docker run --shm-size=8g)"
        yield Shortage("shared memory", f"{_SHARED_FOLDER} has {size / GIB:.2f} GiB", hint)
    try:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
    except OSError:
        yield Shortage("temporary files", "no folder for them can be written to", "set TMPDIR to one")
    else:
        if free < _TEMPORARY:
            found = f"{folder} has {free / MIB:.0f} MiB free"
            yield Shortage("temporary files", found, "free some space there, or set TMPDIR to another folder")
