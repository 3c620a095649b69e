"""Where the bytes of an image lie, whatever holds them. Imports no torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import NamedTuple


class Blob(NamedTuple):
    """The bytes of one image: a whole file, or a part of one.

    Attributes:
        path: the file.
        offset: where the image begins in it.
        size: bytes of the image; ``None``: to the end of the file.
        name: what messages call it; the path where empty.
    """

    path: str
    offset: int = 0
    size: int | None = None
    name: str = ""

    @classmethod
    def of_files(cls, paths: Iterable[str | os.PathLike[str]]) -> list[Blob]:
        """Files that hold one image each."""
        return [cls(os.fspath(path)) for path in paths]

    def __str__(self) -> str:
        return self.name or self.path

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: the file cannot be read, is no regular file (a pipe would be waited for without end), or is too
                short.
        """
        # Opening a pipe waits for its other end, unless this flag is set; regular files do not heed it.
        with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(0, "not a regular file", self.path)
            file.seek(self.offset)
            data = file.read(self.size)
        if self.size is not None and len(data) < self.size:
            raise OSError(0, f"ends {self.size - len(data)} bytes too early", self.path)
        return data
