"""The segments of a JPEG, and what is left of one that was cut short."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fpcn_dist.data.decoding.formats.exif import orientation_of
from fpcn_dist.data.decoding.formats.header import DAMAGED, NO_IMAGE, Header, UnreadableError, not_read

SALVAGED_FROM = 0.95
"""Share of the rows that must be there for the rest to be made up."""

_MOST_SEGMENTS = 10_000
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_ALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers without a segment."""
_START, _END, _SCAN, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_OF_PIXELS = _FRAMES | {0xC4, 0xCC, 0xDA, 0xDB, 0xDD}
_JFIF = b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_ADOBE = b"\xff\xee\x00\x0eAdobe\0d\0\0\0\0"
"""Segments that tell of colours, made anew: damaged ones make decoders disagree. Behind the second stands the kind."""
_NO_MARKER_IN_SCAN = np.zeros(256, dtype=bool)
_NO_MARKER_IN_SCAN[[0x00, *range(0xD0, 0xD8), 0xFF]] = True
_IN_SCANS = {0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}
_PROGRESSIVE = 0xC2
_HUFFMAN, _ARITHMETIC = {0xC0, 0xC1, 0xC2}, {0xC9, 0xCA}
_COLOURS = {1: "grey", 3: "YCbCr", 4: "CMYK"}
# What may follow the bytes that are there: what both of them agree on does not depend on it.
_FILLERS = [hashlib.shake_128(bytes([k])).digest(4096).replace(b"\xff", b"") for k in range(2)]


def is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8\xff")


def parse(data: bytes) -> Header:
    """Size, colours and orientation of a JPEG, of whose segments only those of pixels are kept, and of several only the
    first image.

    Raises:
        UnreadableError: its header is damaged or cut short, or no program of ours shows its kind.
    """
    kept, orientation, frame, adobe, jfif = [], 0, b"", b"", False
    for marker, start, end in itertools.islice(_segments(data), _MOST_SEGMENTS):
        content = data[start + 4 : end]
        if marker in _FRAMES:
            if frame:  # of which size is the image?
                raise UnreadableError(DAMAGED)
            frame = data[start + 1 : end]
        elif marker == _APP1 and not orientation and content[:4] == b"Exif":
            orientation = orientation_of(content)
        elif marker == 0xEE and content[:5] == b"Adobe" and len(content) >= 12:  # as libjpeg knows them
            adobe = content[11:12]
        elif marker == 0xE0 and content[:5] == b"JFIF\0" and len(content) >= 14:
            jfif = True
        if marker == _SCAN:
            break
        if marker in _OF_PIXELS:
            kept.append(data[start:end])
    else:
        raise UnreadableError(NO_IMAGE)
    height, width, mode = _frame(frame)
    if mode == "YCbCr" and not jfif and (adobe == b"\0" or (not adobe and frame[9::3][:3] == b"RGB")):
        mode = "RGB"
    finish, parted = _finish(data, start)
    colours = (_JFIF if jfif else b"") + (_ADOBE + adobe if adobe else b"")
    kept = [data[:2], colours, *kept, data[start:finish]]
    # Where segments lie between its scans, and it is not progressive, decoders disagree about damaged ones.
    whole = finish is not None and (frame[0] == _PROGRESSIVE or not parted)
    plain = mode in ("grey", "YCbCr") and frame[0] in _HUFFMAN and whole
    return Header("JPEG", width, height, orientation or 1, b"".join(kept), mode, plain=plain, cut=finish is None)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the segments up to that of the first scan; bytes between them are passed over."""
    position = 2
    while found := _MARKER.search(data, position):
        marker, start = data[found.end() - 1], found.start()
        if marker in _ALONE:
            position = found.end()
            continue
        if marker == _END or start + 4 > len(data):
            return
        position = start + 2 + max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
        if position > len(data):
            raise UnreadableError(DAMAGED)
        yield marker, start, position


def _frame(frame: bytes) -> tuple[int, int, str]:
    """Height, width and colours that a frame, from its marker on, announces."""
    if len(frame) < 9 or len(frame) < 9 + 3 * frame[8]:
        raise UnreadableError(NO_IMAGE)
    kind, bits, components = frame[0], frame[3], frame[8]
    if kind not in _HUFFMAN | _ARITHMETIC:
        raise not_read("a JPEG", "lossless or hierarchical coding")
    if bits != 8:
        raise not_read("a JPEG", f"{bits} bits a channel")
    if components not in _COLOURS:
        raise not_read("a JPEG", f"{components} channels")
    return int.from_bytes(frame[4:6], "big"), int.from_bytes(frame[6:8], "big"), _COLOURS[components]


def _finish(data: bytes, scan: int) -> tuple[int | None, bool]:
    """Where the image that has its first scan at ``scan`` ends, ``None`` where its end is missing; and whether other
    segments follow that scan.

    Raises:
        UnreadableError: a marker that belongs into no scan says that its data are damaged.
    """
    codes, position, parted = np.frombuffer(data, dtype=np.uint8, offset=scan), 0, False
    places = np.flatnonzero(codes[:-1] == 0xFF)
    for place in places[~_NO_MARKER_IN_SCAN[codes[places + 1]]]:
        if place < position:
            continue
        marker, start = int(codes[place + 1]), scan + int(place)
        if marker == _END:
            return start + 2, parted
        if marker not in _IN_SCANS:
            raise UnreadableError(DAMAGED)
        parted = parted or bool(place)
        position = place + 2 + max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
    return None, parted


def salvage(header: Header, stored: Callable[[Header], NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], int]:
    """What a JPEG that was cut short shows: pixels [H, W, 3] as stored, and how many of its rows are really there.

    Rows count that do not change with what might have followed: of a progressive JPEG those that its last scan has
    reached. The others get the mean colour of these.

    Args:
        header: of the file.
        stored: decodes a whole one.

    Raises:
        UnreadableError: fewer than :data:`SALVAGED_FROM` of the rows are there.
    """
    there = header.encoded.rstrip(b"\xff")
    one, other = (stored(header._replace(encoded=there + filler + b"\xff\xd9", cut=False)) for filler in _FILLERS)
    differing = np.flatnonzero((one != other).any(axis=(1, 2)))
    rows = int(differing[0]) if differing.size else header.height
    if rows < SALVAGED_FROM * header.height:
        raise UnreadableError(f"{DAMAGED} ({rows} of {header.height} rows are there)")
    pixels = one.copy()
    pixels[rows:] = one[:rows].mean(axis=(0, 1)).round()
    return pixels, rows
