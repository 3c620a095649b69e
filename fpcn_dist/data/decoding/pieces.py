"""Batches decoded in pieces, so that the decoded images that are held at once fit into a given memory.

What a backend holds of an image before its view is made has the image's own size. A batch of photographs from a phone
would need gigabytes, so a backend is handed the batch in pieces, and what it made of them is put together again. Images
are decoded one by one: the batch is the same, bit for bit, however it was cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fpcn_dist.data.batch import BatchRequest
from fpcn_dist.data.decoding.backends import Decoding
from fpcn_dist.data.decoding.sizes import cut


class Pieces:
    """A decoding of requests that are cut into pieces; see :class:`fpcn_dist.data.decoding.backends.Decoding`.

    Args:
        requests: whole batches.
        begin: begins to decode an iterator of requests.
        bound: bytes of the decoded images of a piece, where no single image needs more.
    """

    def __init__(
        self, requests: Iterator[BatchRequest], begin: Callable[[Iterator[BatchRequest]], Decoding], bound: int
    ) -> None:
        self._lengths: deque[int] = deque()
        self._decoding = begin(self._cut(requests, bound))

    def _cut(self, requests: Iterator[BatchRequest], bound: int) -> Iterator[BatchRequest]:
        for blobs, views in requests:
            parts = cut(blobs, bound)
            self._lengths.append(len(parts))
            for part in parts:
                yield BatchRequest(blobs[part], views[part])

    def next(self) -> Tensor:
        """The images of the next whole request, [B, 3, crop, crop] float32, normalised, owned by the caller."""
        first = self._decoding.next()
        others = [self._decoding.next() for _ in range(self._lengths.popleft() - 1)]
        return torch.cat([first, *others]) if others else first

    def close(self) -> None:
        """Stop its threads and free its buffers."""
        self._decoding.close()
