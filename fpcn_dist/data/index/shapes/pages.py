"""Where the values of a Parquet column lie in its file, so that one of them can be read without its neighbours.

A column chunk is a sequence of pages, each of which is compressed by itself and preceded by a header in Thrift's
compact protocol (https://parquet.apache.org/docs/file-format/). pyarrow reads the values of a chunk but does not tell
where they were; the headers say where the pages are, and each value is then looked for in the unpacked pages. So the
encodings need not be known, and a place that is found holds the value, byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow

from fpcn_dist.data.blob import Packed

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd", "LZ4": "lz4_raw"}
"""pyarrow's names of what decompresses, by its names of what a chunk is compressed with."""


class Place(NamedTuple):
    """Where a value lies: the part of the file, and how to get the value out of it where that is compressed."""

    offset: int
    size: int
    packed: Packed | None


class _Page(NamedTuple):
    """The part of a page that holds values: where it is in the file, and what it is when unpacked."""

    offset: int
    size: int
    codec: str | None
    values: bytes

    def place(self, start: int, length: int) -> Place:
        if self.codec is None:
            return Place(self.offset + start, length, None)
        return Place(self.offset, self.size, Packed(self.codec, len(self.values), start, length))


def places(chunk: bytes, offset: int, compression: str, values: Iterable[bytes | None]) -> Iterator[Place | None]:
    """The place of each value of a column chunk of strings or binaries; ``None`` for a null.

    Args:
        chunk: the bytes of the chunk.
        offset: where it begins in the file.
        compression: as pyarrow calls it in the chunk's metadata.
        values: of its rows, in their order.

    Raises:
        ValueError: the chunk is damaged, or its values do not lie in it in one piece.
    """
    dictionary: dict[bytes, Place] = {}
    pages = _pages(chunk, offset, compression, dictionary)
    page, at = None, 0
    for value in values:
        if value is None or value in dictionary:
            yield None if value is None else dictionary[value]
            continue
        while page is None or (found := _find(page.values, value, at)) < 0:
            page, at = next(pages, None), 0
            if page is None:
                raise ValueError("its images are stored in an encoding that takes them apart")
            if value in dictionary:
                break
        if value in dictionary:
            yield dictionary[value]
            continue
        yield page.place(found, len(value))
        at = found + len(value)


def _find(data: bytes, value: bytes, at: int) -> int:
    """Where ``value`` begins in ``data`` from ``at`` on: behind its length, as a rule; -1 where it is not there."""
    plain = at + 4
    if data.startswith(value, plain):
        return plain
    return data.find(value, at)


def _pages(chunk: bytes, offset: int, compression: str, dictionary: dict[bytes, Place]) -> Iterator[_Page]:
    """The pages of data of a chunk; what its dictionary holds is entered in ``dictionary``."""
    at = 0
    while at < len(chunk):
        header, begin = _struct(chunk, at)
        kind, unpacked, size = header[1], header[2], header[3]
        at = begin + size
        levels, packed = 0, True
        if kind == _DATA_V2:
            levels, packed = header[8][5] + header[8][6], header[8].get(7, True)
        codec = None if compression == "UNCOMPRESSED" or not packed else _CODECS.get(compression, compression)
        values = chunk[begin + levels : at]
        if len(values) != size - levels:
            raise ValueError("it is cut short")
        if codec is not None:
            try:
                values = pyarrow.decompress(values, unpacked - levels, codec, asbytes=True)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise ValueError(f"a page of it cannot be unpacked ({error})") from None
        page = _Page(offset + begin + levels, size - levels, codec, values)
        if kind == _DICTIONARY:
            for start, length in _plain(values):
                dictionary[values[start : start + length]] = page.place(start, length)
        elif kind in (_DATA, _DATA_V2):
            yield page


def _plain(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and length of the values of a dictionary, each behind its length."""
    at = 0
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, at)
        yield at + 4, length
        at += 4 + length


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol by the numbers of its fields, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head, at = _byte(data, at)
        if head == 0:
            return fields, at
        if head >> 4:
            number += head >> 4
        else:
            number, at = _signed(data, at)
        fields[number], at = _value(data, at, head & 15)


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return _byte(data, at)
    if kind in (4, 5, 6):
        return _signed(data, at)
    if kind == 7:
        return data[at : at + 8], at + 8
    if kind == 8:
        length, at = _unsigned(data, at)
        return data[at : at + length], at + length
    if kind == 12:
        return _struct(data, at)
    raise ValueError("a page of it has an unknown header")


def _signed(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = _byte(data, at)
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _byte(data: bytes, at: int) -> tuple[int, int]:
    if at >= len(data):
        raise ValueError("it is cut short")
    return data[at], at + 1
