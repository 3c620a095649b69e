"""The chunks of a WebP."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

from fpcn_dist.data.decoding.exif import orientation_of
from fpcn_dist.data.decoding.header import DAMAGED, NO_IMAGE, Header, UnreadableError

_MOST_CHUNKS = 200_000


def is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def parse(data: bytes) -> Header:
    """Size and orientation of a WebP, of its first frame where it moves.

    Raises:
        UnreadableError: its header is damaged, or its end is missing.
    """
    if len(data) < 30:
        raise UnreadableError(NO_IMAGE)
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise UnreadableError(DAMAGED)
    chunks = itertools.islice(_chunks(data), _MOST_CHUNKS)
    orientation = next((orientation_of(content) for kind, content in chunks if kind == b"EXIF"), 1)
    width, height = _size(data)
    return Header("WEBP", width, height, orientation, data, "RGB")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = 12
    while start + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, start)
        yield kind, data[start + 8 : start + 8 + length] if kind == b"EXIF" else b""
        start += 8 + length + length % 2


def _size(data: bytes) -> tuple[int, int]:
    kind, first = data[12:16], data[20:30]
    if kind == b"VP8X":
        return int.from_bytes(first[4:7], "little") + 1, int.from_bytes(first[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(first[1:5], "little")
        return bits % 2**14 + 1, (bits >> 14) % 2**14 + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", first, 6)
        return width % 2**14, height % 2**14
    raise UnreadableError(NO_IMAGE)
