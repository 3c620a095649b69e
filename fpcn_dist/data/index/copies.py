"""Copies of remote images on this machine, for the child processes that check them.

A child may die of an image, and knows neither connections nor credentials: this process fetches what a child is to
read, ahead of its questions, and hands it a file: an entry of the cache, or a temporary one where that does not keep
it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.remote.reading import Copy, Piece, reader

_AHEAD = 64
"""Images that are fetched before a child asks for them."""


class Copies(contextlib.ExitStack):
    """Files of this machine with what remote images hold; images that lie on this machine are their own copies.

    Args:
        blobs: images, of which :meth:`of` is first asked in their order.

    Attributes:
        faults: why an image could not be fetched, by its index.
    """

    def __init__(self, blobs: Sequence[Blob]) -> None:
        super().__init__()
        self._blobs, self._begun = blobs, 0
        self._ahead: dict[int, list[Piece]] = {}
        self._copies: dict[int, Copy] = {}
        self.faults: dict[int, str] = {}
        self.callback(lambda: [self.release(index) for index in {*self._ahead, *self._copies}])

    def of(self, index: int) -> Blob:
        """A file that holds an image, until :meth:`release`; one that holds none where it cannot be fetched.

        Raises:
            UserError: the store cannot be read.
        """
        if not self._blobs[index].is_remote:
            return self._blobs[index]
        while self._begun < min(len(self._blobs), index + _AHEAD):
            self._ahead[self._begun] = reader().ahead([self._blobs[self._begun].piece])
            self._begun += 1
        if index not in self._copies and index not in self.faults:
            try:
                self._copies[index] = reader().copy(self._blobs[index].piece)
            except OSError as error:
                self.faults[index] = f"cannot be read ({error.strerror})"
        if index in self.faults:
            return Blob(os.devnull)
        path, size = self._copies[index].path, self._copies[index].size
        return Blob(path, 0, size, str(self._blobs[index]), self._blobs[index].packed)

    def release(self, index: int) -> None:
        """Give up what is held of an image."""
        reader().release(self._ahead.pop(index, []))
        if index in self._copies:
            self._copies.pop(index).close()
