"""The first directory of a TIFF: which of its many kinds are read, and how they are turned.

Pillow gets the file with a directory that holds what describes pixels and nothing else: neither an orientation, which
it applies to some modes twice, nor metadata, further pages and entries of any other kind.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from fpcn_dist.data.decoding.formats.exif import ORIENTATION, TURNS
from fpcn_dist.data.decoding.formats.header import NO_IMAGE, Header, UnreadableError, not_read

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES = 256, 257, 258, 259, 262, 277
_PREDICTOR, _EXTRA, _FORMAT = 317, 338, 339
_OF_PIXELS = frozenset(
    (_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PREDICTOR, _EXTRA, _FORMAT)
    # Fill order, strips, options of CCITT, planes, palette, tiles, JPEG's tables, YCbCr.
    + (266, 273, 278, 279, 284, 292, 293, 320, 322, 323, 324, 325, 347, 529, 530, 531, 532)
)
_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""Types of unsigned integers, as struct has them."""
_MOST_SAMPLES = 16
_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 7, 8, 32773, 32946, 34925, 50000})
_OTHER_COMPRESSIONS = {
    6: "old-style JPEG",
    **dict.fromkeys((33003, 33005, 34712), "JPEG 2000"),
    34892: "lossy JPEG of DNG",
    50001: "WebP",
    **dict.fromkeys((50002, 52546), "JPEG XL"),
}
_BILEVEL_COMPRESSIONS = (2, 3, 4)
_JPEG = 7
_PHOTOMETRICS = {0: "grey", 1: "grey", 2: "RGB", 3: "a palette", 5: "CMYK", 6: "YCbCr", 8: "CIE L*a*b*"}
_INTEGER, _SIGNED, _FLOAT = 1, 2, 3


class _Entry(NamedTuple):
    kind: int
    count: int
    raw: bytes
    """Its whole entry, whose last 4 bytes (8 in a BigTIFF) are the value or where it lies."""


class _Directory(NamedTuple):
    """Where a directory begins, and its entries by tag."""

    start: int
    entries: dict[int, _Entry]


class _Layout(NamedTuple):
    """Byte order and field sizes of a TIFF or BigTIFF."""

    order: str
    big: bool

    @property
    def field(self) -> int:
        return 8 if self.big else 4

    def unpack(self, form: str, data: bytes, offset: int) -> tuple[int, ...]:
        if offset + struct.calcsize(self.order + form) > len(data):
            raise UnreadableError(NO_IMAGE)
        return struct.unpack_from(self.order + form, data, offset)


def is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def parse(data: bytes) -> Header:
    """Size and orientation of a TIFF's first page.

    Raises:
        UnreadableError: its directory is damaged, or it is of a kind that is not read.
    """
    layout = _Layout("<" if data[:2] == b"II" else ">", 43 in data[2:4])
    directory = _directory(data, layout)
    entries = directory.entries
    (width,), (height,) = (_values(data, layout, entries, tag, (0,)) for tag in (_WIDTH, _HEIGHT))
    mode = _mode(data, layout, entries)
    (orientation,) = _values(data, layout, entries, ORIENTATION, (1,))
    encoded = _with_own_directory(data, layout, directory)
    return Header("TIFF", width, height, orientation if orientation in TURNS else 1, encoded, mode)


def _directory(data: bytes, layout: _Layout) -> _Directory:
    """The first directory; of several entries with one tag the first."""
    (start,) = layout.unpack("Q", data, 8) if layout.big else layout.unpack("I", data, 4)
    (count,) = layout.unpack("Q" if layout.big else "H", data, start)
    form = layout.order + ("HHQ8s" if layout.big else "HHI4s")
    size, begin = struct.calcsize(form), start + (8 if layout.big else 2)
    end = begin + size * count
    if end + layout.field > len(data) or count > 0xFFFF:
        raise UnreadableError(NO_IMAGE)
    entries: dict[int, _Entry] = {}
    for place in range(begin, end, size):
        raw = data[place : place + size]
        tag, kind, values, _ = struct.unpack(form, raw)
        entries.setdefault(tag, _Entry(kind, values, raw))
    return _Directory(start, entries)


def _values(
    data: bytes, layout: _Layout, entries: dict[int, _Entry], tag: int, default: tuple[int, ...]
) -> tuple[int, ...]:
    """As many values of an entry as ``default`` has, at most; all, up to a bound, where that is empty."""
    entry = entries.get(tag)
    if entry is None or entry.kind not in _CODES or not entry.count:
        return default
    form = f"{min(entry.count, len(default) or _MOST_SAMPLES)}{_CODES[entry.kind]}"
    value = entry.raw[-layout.field :]
    if entry.count * struct.calcsize(f"={_CODES[entry.kind]}") <= layout.field:
        return layout.unpack(form, value, 0)
    (offset,) = layout.unpack("Q" if layout.big else "I", value, 0)
    return layout.unpack(form, data, offset)


def _mode(data: bytes, layout: _Layout, entries: dict[int, _Entry]) -> str:
    """What a pixel is, in words.

    Raises:
        UnreadableError: of a kind that is not read.
    """

    def values(tag: int, *default: int) -> tuple[int, ...]:
        return _values(data, layout, entries, tag, default)

    (samples,), (photometric,) = values(_SAMPLES, 1), values(_PHOTOMETRIC, -1)
    (compression,), bits = values(_COMPRESSION, 1), values(_BITS) or (1,)
    formats, extra = values(_FORMAT) or (_INTEGER,), values(_EXTRA)
    colours = _PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
    number = {_INTEGER: "", _SIGNED: " signed", _FLOAT: " floating-point"}.get(formats[0], " undefined")
    mode = f"{colours} of {bits[0]}{number} bits" + (f" and {len(extra)} further channel(s)" if extra else "")
    if compression not in _COMPRESSIONS:
        inside = _OTHER_COMPRESSIONS.get(compression, "an unknown compression")
        raise not_read("a TIFF", f"{inside} ({compression}) inside")
    known = set(formats) == {_INTEGER} and len(set(bits)) == 1 and len(bits) in (1, samples)
    if not known or not _is_read(photometric, samples, bits[0], extra, compression):
        raise not_read("a TIFF", mode)
    return mode


def _is_read(photometric: int, samples: int, bits: int, extra: tuple[int, ...], compression: int) -> bool:
    """Whether Pillow shows it as everyone would."""
    if compression in _BILEVEL_COMPRESSIONS and (bits, samples) != (1, 1):
        return False
    match photometric, samples:
        case 0, 1:
            return bits in (1, 2, 4, 8)
        case 1, 1:
            return bits in (1, 2, 4, 8, 16)
        case 1, 2:
            return bits == 8 and extra in ((0,), (1,), (2,))
        case 2, 3:
            return bits in (8, 16) and not extra
        case 2, 4:
            return bits in (8, 16) and extra in ((), (0,), (1,), (2,))
        case 3, 1:
            return bits in (1, 2, 4, 8)
        case 5, 4:
            return bits in (8, 16) and not extra
        case 6, 3:
            return bits == 8 and not extra and compression == _JPEG
    return False


def _with_own_directory(data: bytes, layout: _Layout, directory: _Directory) -> bytes:
    """The file with a shorter directory, in its place: where pixels are missing at the end, none come to be there."""
    own = [directory.entries[tag].raw for tag in sorted(directory.entries) if tag in _OF_PIXELS]
    count = struct.pack(layout.order + ("Q" if layout.big else "H"), len(own))
    shorter = b"".join([count, *own, bytes(layout.field)])
    return b"".join([data[: directory.start], shorter, data[directory.start + len(shorter) :]])
