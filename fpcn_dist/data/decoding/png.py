"""The chunks of a PNG."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import NamedTuple

from fpcn_dist.data.decoding.exif import exif_in_text, orientation_of
from fpcn_dist.data.decoding.header import DAMAGED, NO_IMAGE, Header, UnreadableError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST_CHUNKS = 200_000
_OF_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_COLOURS = {0: "grey", 2: "RGB", 3: "a palette", 4: "grey and alpha", 6: "RGB and alpha"}


class _Chunk(NamedTuple):
    kind: bytes
    start: int
    end: int

    def content(self, data: bytes) -> bytes:
        return data[self.start + 8 : self.end - 4]


def is_png(data: bytes) -> bool:
    return data.startswith(_SIGNATURE)


def parse(data: bytes) -> Header:
    """Size and orientation of a PNG, of which only the chunks of pixels are kept.

    Raises:
        UnreadableError: its header is damaged, or its end is missing.
    """
    chunks = list(itertools.islice(_chunks(data), _MOST_CHUNKS))
    if not chunks or chunks[0].kind != b"IHDR" or chunks[0].end - chunks[0].start != 25:
        raise UnreadableError(NO_IMAGE)
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if chunks[-1].kind != b"IEND":
        raise UnreadableError(DAMAGED)
    kept = [data[chunk.start : chunk.end] for chunk in chunks if chunk.kind in _OF_PIXELS]
    mode = f"{_COLOURS.get(colour, 'unknown colours')} of {bits} bits"
    return Header("PNG", width, height, _orientation(data, chunks), b"".join([_SIGNATURE, *kept]), mode)


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """The chunks that are whole, up to the end of the image."""
    start = len(_SIGNATURE)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            return
        yield _Chunk(kind, start, end)
        if kind == b"IEND":
            return
        start = end


def _orientation(data: bytes, chunks: list[_Chunk]) -> int:
    """Of the chunk for EXIF, or of a text chunk, which took its place before there was one."""
    for chunk in chunks:
        if chunk.kind == b"eXIf":
            return orientation_of(chunk.content(data))
    for chunk in chunks:
        if chunk.kind in (b"tEXt", b"zTXt") and (exif := exif_in_text(chunk.kind, chunk.content(data))):
            return orientation_of(exif)
    return 1
