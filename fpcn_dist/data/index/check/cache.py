"""What checks of files found, remembered in a file, so that no file is decoded again until it changes."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from fpcn_dist.data.blob import FileState
from fpcn_dist.data.index.check.checking import Check
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text

_EVERY = 5.0
"""Seconds after which what was found is written, so that a start that is killed is repeated no further back."""


class CheckCache:
    """Remembered checks, by the name and state of a file.

    The file holds a line ``{"key": ..., "files": {name: [size, modified, reason, digest, bytes]}}`` of JSON for each
    time that something was added to it, of which :meth:`close` makes one. Several processes may share it. A line is
    written at once and read alone, so that one cut short or overwritten (by a full disk, a kill, or on NFS another
    machine) spoils no other. What is lost is found again.

    Args:
        file: where; ``None`` remembers nothing.
        key: of what decides, such as the decoder; what was found with another key is forgotten.
    """

    def __init__(self, file: Path | None, key: str) -> None:
        self._file, self._key = file, key
        self._known = {} if file is None else self._read(file)
        self._news: dict[str, list] = {}
        self._written = time.monotonic()
        self._unwritten: list[str] = []

    def recall(self, name: str, state: FileState | None) -> Check | None:
        """What was found out about a file in this state, if anything."""
        row = self._known.get(name)
        return Check(*row[2:]) if row is not None and state is not None and (row[0], row[1]) == state else None

    def note(self, name: str, state: FileState | None, check: Check) -> None:
        """Remember what was found out about a file; nothing where it could not be read."""
        if self._file is None or state is None or not check.digest:
            return
        self._news[name] = [*state, check.reason, check.digest, check.size]
        self._unwritten.append(name)
        if time.monotonic() - self._written > _EVERY:
            self._append(self._file)

    def close(self) -> None:
        """Write what is known as one line, with what other processes have found meanwhile."""
        if self._file is None or not self._news:
            return
        files = self._read(self._file) | self._news
        # A cache that cannot be written costs time at the next start, and must not stop this one.
        with contextlib.suppress(OSError, UserError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, self._line(files))

    def _append(self, file: Path) -> None:
        line = self._line({name: self._news[name] for name in self._unwritten})
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "ab", buffering=0) as end:
                end.write(f"\n{line}\n".encode())  # a new line, whatever the last one was cut to
        self._unwritten.clear()
        self._written = time.monotonic()

    def _line(self, files: dict[str, list]) -> str:
        return json.dumps({"key": self._key, "files": files})

    def _read(self, file: Path) -> dict[str, list]:
        files: dict[str, list] = {}
        try:
            lines = file.read_bytes().splitlines()
        except OSError:
            return files
        for line in filter(None, lines):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                content = json.loads(line)
                if content["key"] == self._key:
                    files.update((name, row) for name, row in content["files"].items() if len(row) == 5)
        return files
