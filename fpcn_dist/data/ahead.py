"""Remote images of the next batches are fetched before they are due: what a loader asks for is known long before."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator

from torch import Tensor

from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, BatchRequest
from fpcn_dist.data.decoding.backends import Decoding
from fpcn_dist.data.remote.reading import Piece, reader

BATCHES_AHEAD = 4
"""Batches of remote images that are fetched before a backend asks for them."""
_BATCHES_READ = 2 * BATCHES_IN_FLIGHT
"""Batches after which a backend has read one that it was handed."""


class FetchedAhead:
    """A decoding of requests whose remote images are fetched ahead; see
    :class:`fpcn_dist.data.decoding.backends.Decoding`.

    Args:
        requests: what to decode; so many more are asked for, ahead of time, where their images are remote.
        begin: begins to decode an iterator of requests.
    """

    def __init__(self, requests: Iterator[BatchRequest], begin: Callable[[Iterator[BatchRequest]], Decoding]) -> None:
        self._requests = _fetched_ahead(requests)
        self._decoding = begin(self._requests)

    def next(self) -> Tensor:
        """The images of the next request, [B, 3, crop, crop] float32, normalised, owned by the caller."""
        return self._decoding.next()

    def close(self) -> None:
        """Stop its threads and free its buffers, and give up what was fetched."""
        self._decoding.close()
        self._requests.close()


def _fetched_ahead(requests: Iterator[BatchRequest]) -> Generator[BatchRequest]:
    first = next(requests, None)
    if first is None:
        return
    requests = itertools.chain([first], requests)
    if not any(blob.is_remote for blob in first.blobs):
        yield from requests
        return
    source, planned, held = reader(), deque[BatchRequest](), deque[list[Piece]]()
    try:
        for request in itertools.chain(requests, [None] * BATCHES_AHEAD):
            if request is not None:
                planned.append(request)
                held.append(source.ahead(blob.piece for blob in request.blobs if blob.is_remote))
            if planned and (request is None or len(planned) > BATCHES_AHEAD):
                yield planned.popleft()
            if len(held) > len(planned) + _BATCHES_READ:
                source.release(held.popleft())
    finally:
        for pieces in held:
            source.release(pieces)
