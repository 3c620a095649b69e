"""The headers of BMP and GIF, which know no orientation."""

from __future__ import annotations

import struct

from fpcn_dist.data.decoding.formats.header import NO_IMAGE, Header, UnreadableError

_OLD_BMP_HEADER = 12


def is_bmp(data: bytes) -> bool:
    return data.startswith(b"BM")


def parse_bmp(data: bytes) -> Header:
    """Raises UnreadableError."""
    if len(data) < 30:
        raise UnreadableError(NO_IMAGE)
    (size,) = struct.unpack_from("<I", data, 14)
    if size == _OLD_BMP_HEADER:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
    else:
        width, height, _, bits = struct.unpack_from("<iiHH", data, 18)
    return Header("BMP", width, abs(height), 1, data, f"{bits} bits a pixel")


def is_gif(data: bytes) -> bool:
    return data.startswith((b"GIF87a", b"GIF89a"))


def parse_gif(data: bytes) -> Header:
    """Of its first frame, on its canvas. Raises UnreadableError."""
    if len(data) < 13:
        raise UnreadableError(NO_IMAGE)
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("GIF", width, height, 1, data, "a palette")
