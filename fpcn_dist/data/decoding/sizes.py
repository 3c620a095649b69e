"""How much memory decoded images take, and batches cut so that they fit into a given one. Imports no torch."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence

from PIL import Image

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.formats.header import UnreadableError
from fpcn_dist.data.decoding.photograph import examine
from fpcn_dist.runtime.errors import UserError

_CHANNELS = 3
_KNOWN = 2**17
"""Images whose size is remembered, in 50 MB: that of most is needed in every epoch."""


def require_memory(max_decoded_mib: int) -> None:
    """Raise a UserError unless it is above 0."""
    if max_decoded_mib < 1:
        raise UserError("--max-decoded-mib", max_decoded_mib, "is not above 0", "give the MiB that images may take")


def cut(blobs: Sequence[Blob], bound: int) -> list[slice]:
    """Consecutive parts of a batch, none of them empty, whose decoded images fit into ``bound`` bytes.

    An image that is larger by itself, or whose header cannot be read, is alone in its part.
    """
    begins, held = [0], 0
    for index, blob in enumerate(blobs):
        size = decoded_bytes(blob)
        if index and (size is None or held + size > bound):
            begins.append(index)
            held = 0
        held += bound if size is None else size
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(blobs)], strict=True)]


@functools.lru_cache(_KNOWN)
def decoded_bytes(blob: Blob) -> int | None:
    """Bytes of the image as RGB, from its header; ``None`` where that cannot be read, which decoding will report."""
    if blob.size is None and not blob.is_remote:
        # Of a large file on a network disk, this reads the beginning alone.
        with contextlib.suppress(Exception), Image.open(blob.path) as image:
            return _CHANNELS * image.width * image.height
    try:
        header = examine(blob.read(), sys.maxsize, salvage=True)
    except (OSError, UnreadableError):
        return None
    return _CHANNELS * header.width * header.height
