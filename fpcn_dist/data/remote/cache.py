"""A bounded folder of what was fetched, shared by all processes of a machine.

An entry is a file: the content, its SHA-256, and a mark of the version under which the store listed it. Whoever reads
an entry compares the content with its SHA-256, so that an entry needs no fsync: one that a crash left half written is
no entry. What was used last is evicted last. The bytes of all entries stand in a ledger, whose lock (flock) a writer
holds while it writes, so that the bound holds for all processes together; evicting counts anew. A pinned entry is held
open under a shared lock, without which no process evicts it, and which ends with the process that holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_DIGEST, _MARK = 32, 16
_TRAILER = _DIGEST + _MARK
_LEDGER = "ledger"
_AFTER_EVICTION = 0.9
"""Share of the bound that eviction leaves, so that most writes need not look at all entries."""
_FORGOTTEN = 3600.0
"""Seconds after which a temporary file is taken for one of a process that was killed."""


class _Entry(NamedTuple):
    used: int
    size: int
    path: str


class Cache:
    """What was fetched, by key; each instance is used by any number of threads.

    A cache that cannot be written to says so once, and holds what it has: nothing depends on it but time.

    Args:
        folder: where the entries lie; made when the first one is written.
        limit: bytes that all entries together may take; 0 keeps nothing.

    Attributes:
        writable: whether anything is kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.writable = limit > 0

    def read(self, key: str, version: str, digest: str) -> bytes | None:
        """The content under ``key``, or ``None`` where there is none, or another one.

        Args:
            key: of the entry.
            version: the version that it must be of, where its digest is not known.
            digest: SHA-256 that the content must have, in hexadecimal; empty where it is not known.
        """
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                whole = file.read()
                os.utime(file.fileno())
        except OSError:
            return None
        content, found, mark = whole[:-_TRAILER], whole[-_TRAILER:-_MARK], whole[-_MARK:]
        if len(whole) < _TRAILER or hashlib.sha256(content).digest() != found:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        same = found.hex() == digest if digest else mark == _mark(version)
        return content if same else None

    def write(self, key: str, version: str, content: bytes) -> bool:
        """Keep ``content``, of ``version``, and evict for it what was not used for longest; gives whether it is kept.

        It is not where the cache cannot be written to, or where the rest is pinned and leaves too little room.
        """
        size = len(content) + _TRAILER
        if not self.writable or size > self.limit:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._ledger() as used:
                if used[0] + size > self.limit:
                    used[0] = self._evict(max(0, int(self.limit * _AFTER_EVICTION) - size))
                if used[0] + size > self.limit:
                    return False
                used[0] += self._replace(self.path(key), content, version)
        except OSError as error:
            self._give_up(error)
            return False
        return True

    def pin(self, key: str) -> int | None:
        """Keep the entry under ``key`` from being evicted until the descriptor is closed; ``None`` without an entry."""
        try:
            descriptor = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a file system without locks protects what was used last alone
            os.utime(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return descriptor

    def path(self, key: str) -> Path:
        """Where the entry under ``key`` lies, if there is one."""
        return self.folder / hashlib.blake2b(os.fsencode(key), digest_size=20).hexdigest()

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[list[int]]:
        """The bytes of all entries, as a list of one, which no other thread or process changes in the meantime."""
        with open(os.open(self.folder / _LEDGER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read()
            used = [int(text) if text.isdigit() else self._evict(self.limit)]
            yield used
            file.seek(0)
            file.truncate()
            file.write(b"%d" % used[0])

    def _replace(self, path: Path, content: bytes, version: str) -> int:
        """Write an entry, whole or not at all; gives by how many bytes all entries have grown."""
        before = path.stat().st_size if path.exists() else 0
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.writelines([content, hashlib.sha256(content).digest(), _mark(version)])
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return len(content) + _TRAILER - before

    def _evict(self, target: int) -> int:
        """Delete what was not used for longest until ``target`` bytes are left, or only what is pinned; gives how many
        are left."""
        entries = []
        with os.scandir(self.folder) as found:
            for file in found:
                with contextlib.suppress(FileNotFoundError):
                    state = file.stat()
                    if not file.name.endswith(".tmp") and file.name != _LEDGER:
                        entries.append(_Entry(state.st_mtime_ns, state.st_size, file.path))
                    elif file.name != _LEDGER and state.st_mtime < time.time() - _FORGOTTEN:
                        os.unlink(file.path)
        used = sum(entry.size for entry in entries)
        for entry in sorted(entries):
            if used <= target:
                break
            if _unlinked(entry.path):
                used -= entry.size
        return used

    def _give_up(self, error: OSError) -> None:
        if self.writable:
            self.writable = False
            reason = f"the cache of remote images at {self.folder} cannot be written to ({error.strerror or error})"
            hint = "free some space there, lower data.cache_gib, or set XDG_CACHE_HOME to another folder"
            gib = f"{self.limit / 2**30:g}"
            line = f"warning: data.cache_gib {gib}: {reason}; what it lacks is fetched each time; {hint}"
            print(line, file=sys.stderr, flush=True)


def _mark(version: str) -> bytes:
    return hashlib.blake2b(version.encode(), digest_size=_MARK).digest()


def _unlinked(path: str) -> bool:
    """Delete an entry, unless a process has pinned it; gives whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # writable, which locks on NFS ask for
    except FileNotFoundError:
        return True
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        os.unlink(path)
        return True
    except FileNotFoundError:
        return True
    finally:
        os.close(descriptor)
