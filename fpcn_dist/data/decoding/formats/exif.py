"""The orientation that EXIF gives, read by one bounded parser that takes damaged bytes for what is left of them."""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4
_MOST_TEXT = 1 << 20


class Turn(NamedTuple):
    """How stored pixels become upright: first rows and columns are exchanged, then their orders are reversed."""

    exchange: bool
    reverse_rows: bool
    reverse_columns: bool


TURNS = {
    1: Turn(False, False, False),
    2: Turn(False, False, True),
    3: Turn(False, True, True),
    4: Turn(False, True, False),
    5: Turn(True, False, False),
    6: Turn(True, False, True),
    7: Turn(True, True, True),
    8: Turn(True, True, False),
}
"""By EXIF orientation."""


def upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of the pixels as they are to be looked at."""
    turn = TURNS[orientation]
    turned = pixels_HWC.swapaxes(0, 1) if turn.exchange else pixels_HWC
    return turned[:: -1 if turn.reverse_rows else 1, :: -1 if turn.reverse_columns else 1]


def orientation_of(exif: bytes) -> int:
    """The orientation, 1 to 8, in the first directory of EXIF data; 1 where there is none, or it makes no sense.

    The entries that are there count, even where the directory promises more.
    """
    if exif[:4] == b"Exif":
        exif = exif[6:]
    if exif[:4] not in (b"II*\0", b"MM\0*") or len(exif) < 8:
        return 1
    order = "<" if exif[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    entries = exif[start + 2 : start + 2 + 12 * count]
    for tag, kind, _, value in struct.iter_unpack(f"{order}HHI4s", entries[: len(entries) // 12 * 12]):
        if tag == ORIENTATION:
            if kind not in (_SHORT, _LONG):
                return 1
            (found,) = struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'I'}", value)
            return found if found in TURNS else 1
    return 1


def exif_in_text(kind: bytes, content: bytes) -> bytes:
    """EXIF that a PNG's text chunk ``tEXt`` or ``zTXt`` holds in hexadecimal, as ImageMagick and exiftool write it."""
    keyword, _, text = content.partition(b"\0")
    if keyword not in (b"Raw profile type exif", b"Raw profile type APP1"):
        return b""
    if kind == b"zTXt":
        try:
            text = zlib.decompressobj().decompress(text[1:], _MOST_TEXT)
        except zlib.error:
            return b""
    found = re.match(rb"\s*\w+\s+\d+\s+([0-9a-fA-F\s]*)", text[:_MOST_TEXT])
    digits = b"".join(found[1].split()) if found else b""
    return bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))
