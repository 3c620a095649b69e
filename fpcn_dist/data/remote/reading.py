"""Remote images read through the cache, and fetched before they are read."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fpcn_dist.data.remote.cache import Cache
from fpcn_dist.data.remote.store import fetch
from fpcn_dist.runtime.errors import Outage
from fpcn_dist.runtime.files import cache_home

_THREADS = 16
"""Objects that a process fetches at a time: their latency, not their size, is what takes time."""
_MOST_PINS = 256
"""Entries of the cache that a process pins, each with an open file, of a usual bound of 1,024. The others that it asked
for are those used last, which are evicted last."""
_MOST_IN_MEMORY = 64
"""Objects that are fetched ahead where the cache keeps none."""
_GONE, _OTHER = "there is no such object any more", "its content is another one than when it was checked"


class Piece(NamedTuple):
    """An object of a store, or a part of one, and what is known of it.

    Attributes:
        url: of the object.
        start: where the part begins.
        size: bytes of the part; ``None``: the whole object.
        version: as the store listed it; empty where it is not known.
        digest: SHA-256 of the bytes in hexadecimal; empty where it is not known.
    """

    url: str
    start: int = 0
    size: int | None = None
    version: str = ""
    digest: str = ""

    @property
    def key(self) -> str:
        return self.url if self.size is None else f"{self.url}:{self.start}+{self.size}"


class Copy(NamedTuple):
    """A file of this machine that begins with the bytes of a piece.

    Attributes:
        path: of the file.
        size: bytes of the piece.
        pin: the descriptor that keeps it in the cache; ``None`` where it is a temporary file.
    """

    path: str
    size: int
    pin: int | None

    def close(self) -> None:
        """Let the cache evict it; a temporary file is deleted."""
        if self.pin is not None:
            os.close(self.pin)
        else:
            os.unlink(self.path)


class _Held(NamedTuple):
    """What was fetched ahead: perhaps a pin of its entry in the cache; the bytes where the cache does not keep them."""

    pin: int | None
    content: bytes | None


class Reader:
    """Reads pieces through a cache, from any number of threads."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetching")
        self._lock = threading.Lock()
        self._ahead: dict[Piece, tuple[Future[_Held], int]] = {}

    def read(self, piece: Piece) -> bytes:
        """The bytes of a piece, from where they are nearest.

        Raises:
            OSError: there is no such object any more, or it has changed since it was checked.
            UserError: see :func:`fpcn_dist.data.remote.store.fetch`.
        """
        with self._lock:
            ahead = self._ahead.get(piece)
        content = None
        # What failed ahead of time, or was given up meanwhile by another loader, may go well now, or says so again.
        if ahead is not None and _succeeded(ahead[0]):
            content = ahead[0].result().content
        if content is None:
            content = self.cache.read(piece.key, piece.version, piece.digest)
        return self._fetch(piece)[1] if content is None else content

    def copy(self, piece: Piece) -> Copy:
        """A file that holds a piece until the copy is closed; an entry of the cache where that keeps it.

        Raises:
            OSError, UserError: see :meth:`read`; or, as an :class:`Outage`, there is no room for a temporary file.
        """
        content = self.read(piece)
        if (pin := self.cache.pin(piece.key)) is not None:
            return Copy(str(self.cache.path(piece.key)), len(content), pin)
        try:
            with tempfile.NamedTemporaryFile(prefix="fpcn-", delete=False) as file:
                file.write(content)
        except OSError as error:
            reason = f"has no room for a copy of {piece.url} ({error.strerror})"
            raise Outage("TMPDIR", tempfile.gettempdir(), reason, "free some space there") from error
        return Copy(file.name, len(content), None)

    def ahead(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Begin to fetch pieces that will be read; gives those that :meth:`release` must be called for."""
        begun = []
        with self._lock:
            for piece in pieces:
                future, readers = self._ahead.get(piece, (None, 0))
                if future is None and not self.cache.writable and len(self._ahead) >= _MOST_IN_MEMORY:
                    break
                self._ahead[piece] = future or self._pool.submit(self._hold, piece), readers + 1
                begun.append(piece)
        return begun

    def release(self, pieces: Iterable[Piece]) -> None:
        """Give up what :meth:`ahead` holds: what is in the cache may be evicted, what was not begun is not fetched."""
        for piece in pieces:
            with self._lock:
                future, readers = self._ahead[piece]
                if readers > 1:
                    self._ahead[piece] = future, readers - 1
                    continue
                del self._ahead[piece]
            if not future.cancel():
                future.add_done_callback(_unpin)

    def _hold(self, piece: Piece) -> _Held:
        pin, content = self.cache.pin(piece.key), None
        if pin is None:
            kept, content = self._fetch(piece)
            # What the cache took it may have evicted already, for another piece.
            if kept and (pin := self.cache.pin(piece.key)) is not None:
                content = None
        if pin is not None and len(self._ahead) > _MOST_PINS:
            os.close(pin)
            pin = None
        return _Held(pin, content)

    def _fetch(self, piece: Piece) -> tuple[bool, bytes]:
        """Fetch a piece and hand it to the cache; gives whether that keeps it, and the bytes."""
        for _ in range(2):  # what was damaged on its way is whole the second time
            try:
                content = fetch(piece.url, piece.start, piece.size)
            except FileNotFoundError:
                raise FileNotFoundError(0, _GONE, piece.url) from None
            if not piece.digest or hashlib.sha256(content).hexdigest() == piece.digest:
                return self.cache.write(piece.key, piece.version, content), content
        raise OSError(0, _OTHER, piece.url)


def _succeeded(future: Future[_Held]) -> bool:
    try:
        return future.exception() is None
    except CancelledError:
        return False


def _unpin(future: Future[_Held]) -> None:
    if _succeeded(future) and (pin := future.result().pin) is not None:
        os.close(pin)


_limit = 0


def bound_cache(gib: float) -> None:
    """Let the cache of this process take so much from now on: the recipe's ``data.cache_gib``."""
    global _limit
    _limit = int(gib * 2**30)


def reader() -> Reader:
    """The reader that all of this process share."""
    return _reader(os.getpid(), cache_home() / "objects", _limit)


@functools.lru_cache(maxsize=8)
def _reader(process: int, folder: Path, limit: int) -> Reader:
    return Reader(Cache(folder, limit))
