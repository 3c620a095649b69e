"""Where the bytes of an image lie, whatever holds them. Imports no torch."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fpcn_dist.runtime.address import is_url

if TYPE_CHECKING:
    from fpcn_dist.data.remote.reading import Piece

_KEPT = 128 << 20
"""Bytes of unpacked pages that a process keeps: neighbours, which are often wanted next, need no second unpacking."""


class Packed(NamedTuple):
    """How a piece of a file holds an image: it is compressed, and the image is a part of what comes out.

    Attributes:
        codec: as pyarrow calls it, for example ``snappy``.
        unpacked: bytes of the whole piece after unpacking.
        start: where the image begins among these.
        length: bytes of the image.
    """

    codec: str
    unpacked: int
    start: int
    length: int

    def unpack(self, data: bytes) -> bytes:
        """All that the piece holds.

        Raises:
            OSError: the piece is damaged, or pyarrow, which unpacks it, is not installed.
        """
        try:
            import pyarrow
        except ImportError:
            raise OSError(0, "pyarrow is not installed") from None
        try:
            return pyarrow.decompress(data, self.unpacked, self.codec, asbytes=True)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise OSError(0, f"the page that holds it is damaged: {error}") from None


class _Pages:
    """The unpacked pages that were used last."""

    def __init__(self) -> None:
        self._pages: OrderedDict[tuple[str, int, FileState | None], bytes] = OrderedDict()
        self._size, self._lock = 0, threading.Lock()

    def get(self, blob: Blob, packed: Packed) -> bytes:
        """The page that holds an image; of a file that has changed, it is read again.

        Raises:
            OSError: it cannot be read or unpacked.
        """
        key = blob.path, blob.offset, file_state(blob.path)
        with self._lock:
            if key in self._pages:
                self._pages.move_to_end(key)
                return self._pages[key]
        page = packed.unpack(blob._replace(packed=None).read())
        with self._lock:
            if key not in self._pages:
                self._pages[key], self._size = page, self._size + len(page)
            while self._size > _KEPT:
                self._size -= len(self._pages.popitem(last=False)[1])
        return page


_PAGES = _Pages()


class Stored(NamedTuple):
    """What is known of an object of a remote folder before it is read.

    Attributes:
        size: bytes.
        version: what its store lists of it, and changes with it; empty where it was not listed.
        digest: SHA-256 that it must have, in hexadecimal; empty where it was not checked yet.
    """

    size: int
    version: str = ""
    digest: str = ""


class Blob(NamedTuple):
    """The bytes of one image: a whole file, a part of one, or a part of a compressed part.

    It is small, and processes may hand it to each other.

    Attributes:
        path: the file, or the URL of an object.
        offset: where the image, or the compressed part that holds it, begins in the file.
        size: bytes of these; ``None``: to the end of the file.
        name: what messages call it; the path where empty.
        packed: how to get the image out of a compressed part; ``None`` where nothing is compressed.
        stored: what is known of a remote object; ``None`` for what lies on this machine.
    """

    path: str
    offset: int = 0
    size: int | None = None
    name: str = ""
    packed: Packed | None = None
    stored: Stored | None = None

    @classmethod
    def of_files(cls, paths: Iterable[str | os.PathLike[str]]) -> list[Blob]:
        """Files that hold one image each."""
        return [cls(os.fspath(path)) for path in paths]

    @classmethod
    def within(cls, folder: str, path: str, place: Blob | None) -> Blob:
        """The image that a data folder calls ``path``: a file of that name, or what lies at a place of the folder.

        Args:
            folder: the data folder.
            path: what the image is called.
            place: where it lies, its file relative to the folder; ``None``: it is a file of its own.
        """
        if place is None:
            return cls(os.path.join(folder, path))
        file = os.path.join(folder, place.path)
        return place._replace(path=file, name=f"{path} in {file}")

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Blob:
        """What was a list in JSON."""
        path, offset, size, name, packed, stored = [*values, None][:6]  # older manifests know nothing of remote objects
        return cls(path, offset, size, name, packed and Packed(*packed), stored and Stored(*stored))

    def __str__(self) -> str:
        return self.name or self.path

    @property
    def key(self) -> str:
        """What tells it from all other blobs on this machine: its absolute path, and where it lies in the file."""
        path = self.path if self.is_remote else os.path.abspath(self.path)
        if self.size is None:
            return path
        return f"{path}:{self.offset}+{self.size}" + (f":{self.packed.start}" if self.packed else "")

    @property
    def is_remote(self) -> bool:
        """Whether it is an object of a store, and not a file of this machine."""
        return is_url(self.path)

    @property
    def piece(self) -> Piece:
        """What is fetched of a remote object."""
        from fpcn_dist.data.remote.reading import Piece

        _, version, digest = self.stored or Stored(0)
        return Piece(self.path, self.offset, self.size, version, digest)

    def read(self) -> bytes:
        """The bytes of the image; those of a remote object through the cache of this machine.

        Raises:
            OSError: the file cannot be read, is no regular file (a pipe would be waited for without end), is too
                short, or is damaged; or an object is gone, or has changed since it was checked.
            UserError: a remote object cannot be read for a reason that is not its own.
        """
        if self.is_remote:
            from fpcn_dist.data.remote.reading import reader

            return reader().read(self.piece)
        if self.packed is not None:
            return _PAGES.get(self, self.packed)[self.packed.start : self.packed.start + self.packed.length]
        # Opening a pipe waits for its other end, unless this flag is set; regular files do not heed it.
        with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(0, "not a regular file", self.path)
            file.seek(self.offset)
            data = file.read(self.size)
        if self.size is not None and len(data) < self.size:
            raise OSError(0, f"ends {self.size - len(data)} bytes too early", self.path)
        return data


FileState = tuple[int, int | str]
"""Size and modification time, or the version of a remote object: what must not have changed for what is known about it
to hold."""


def file_state(path: str | os.PathLike[str]) -> FileState | None:
    """The state of a file; ``None`` where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
