"""Remote images of the next batches are fetched before they are due: what a loader asks for is known long before."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, BatchRequest
from fpcn_dist.data.remote.reading import Piece, reader

BATCHES_AHEAD = 4
"""Batches of remote images that are fetched before a backend asks for them."""
_BATCHES_READ = 2 * BATCHES_IN_FLIGHT
"""Batches after which a backend has read one that it was handed."""


def fetched_ahead(requests: Iterator[BatchRequest]) -> Iterator[BatchRequest]:
    """The same requests, of whose remote images the next ones are being fetched; others are handed on as they are."""
    first = next(requests, None)
    if first is None:
        return iter(())
    requests = itertools.chain([first], requests)
    return _fetched_ahead(requests) if any(blob.is_remote for blob in first.blobs) else requests


def _fetched_ahead(requests: Iterator[BatchRequest]) -> Iterator[BatchRequest]:
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
