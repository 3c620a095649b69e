"""Damage to image files as disks, transfers and odd programs do it, drawn by a random generator."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"
_EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def damaged(data: bytes, rng: Random) -> bytes:
    """The file after one to three damages."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kinds = [_flip, _flip, _cut, _insert, _remove, _extreme, _copy_within]
        if parts_of(data):
            kinds += [_change_parts] * 4
        if tiff_directories(data):
            kinds += [_change_directory] * 5
        data = rng.choice(kinds)(data, rng)
    return data


def _place(data: bytes, rng: Random) -> int:
    """A place in the file: one in two near its begin or in its metadata."""
    if rng.random() < 0.25:
        return rng.randrange(min(len(data), 64) or 1)
    if (directories := tiff_directories(data)) and rng.random() < 0.35:
        return min(len(data) - 1, rng.choice(directories).start + rng.randrange(64))
    return rng.randrange(len(data) or 1)


def _flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 8]) if data else 0):
        at = _place(data, rng)
        changed[at] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
    return mended(bytes(changed), rng)


def _cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice([_place(data, rng), max(0, len(data) - rng.randrange(1, 64))])]


def _insert(data: bytes, rng: Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.randrange(1, 17)) + data[at:]


def _remove(data: bytes, rng: Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.randrange(1, 33) :]


def _extreme(data: bytes, rng: Random) -> bytes:
    """A number of two or four bytes becomes a borderline one."""
    at, size = _place(data, rng), rng.choice([2, 4])
    value = rng.choice([*_EXTREME, len(data), len(data) + 1]) & (0xFFFF if size == 2 else 0xFFFFFFFF)
    return mended(data[:at] + value.to_bytes(size, rng.choice(["little", "big"])) + data[at + size :], rng)


def _copy_within(data: bytes, rng: Random) -> bytes:
    at, to, size = _place(data, rng), _place(data, rng), rng.randrange(1, 65)
    return data[:to] + data[at : at + size] + data[to + size :]


class Part(NamedTuple):
    """A chunk or segment: its first byte, the byte behind it, and where its length stands."""

    start: int
    end: int
    length: int


def parts_of(data: bytes) -> list[Part]:
    """The chunks of a PNG or WebP, or the segments of a JPEG before its pixels; none where there is no such order."""
    if data.startswith(_PNG):
        return _chunks(data, 8, ">", 0, 4, 12)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _chunks(data, 12, "<", 4, 0, 8)
    parts, at = [], 2
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        parts.append(Part(at, end, at + 2))
        at = end
    return [part for part in parts if part.end <= len(data)]


def _chunks(data: bytes, at: int, order: str, length_at: int, _: int, around: int) -> list[Part]:
    parts = []
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(f"{order}I", data, at + length_at)
        end = at + around + length + (length % 2 if order == "<" else 0)
        if end > len(data):
            break
        parts.append(Part(at, end, at + length_at))
        at = end
    return parts


def _change_parts(data: bytes, rng: Random) -> bytes:
    """Drop, repeat, move or lengthen a part."""
    parts = parts_of(data)
    part, other = rng.choice(parts), rng.choice(parts)
    whole = data[part.start : part.end]
    kind = rng.randrange(5)
    if kind == 0:
        return data[: part.start] + data[part.end :]
    if kind == 1:
        return data[: other.start] + whole + data[other.start :]
    if kind == 2:
        return data[: part.end] + whole + data[part.end :]
    size = 4 if data[:1] != b"\xff" else 2
    order = "little" if data[:4] == b"RIFF" else "big"
    if kind == 3:
        value = rng.choice([*_EXTREME, part.end - part.start + rng.randrange(-12, 13)])
        written = (value % (1 << 8 * size)).to_bytes(size, order)
        return data[: part.length] + written + data[part.length + size :]
    room = bytearray(whole)  # its inside changes, and its checksum is right again
    for _ in range(rng.randrange(1, 5)):
        room[rng.randrange(len(room))] = rng.randrange(256)
    return mended(data[: part.start] + bytes(room) + data[part.end :], rng, always=True)


def mended(data: bytes, rng: Random, *, always: bool = False) -> bytes:
    """A PNG whose checksums are right again, in most cases, so that a damage reaches what reads the chunks."""
    if not data.startswith(_PNG) or not (always or rng.random() < 0.8):
        return data
    whole = bytearray(data)
    for part in parts_of(data):
        struct.pack_into(">I", whole, part.end - 4, zlib.crc32(data[part.start + 4 : part.end - 4]))
    return bytes(whole)


class Directory(NamedTuple):
    """A TIFF header anywhere in a file (of a TIFF, or of EXIF), its byte order, and its first directory's entries."""

    start: int
    order: str
    entries: int
    count: int


def tiff_directories(data: bytes) -> list[Directory]:
    """Those that are found by their first bytes."""
    found = []
    for magic, order in ((b"II*\0", "<"), (b"MM\0*", ">")):
        at = data.find(magic)
        while at >= 0 and len(found) < 4:
            if at + 8 <= len(data):
                (first,) = struct.unpack_from(f"{order}I", data, at + 4)
                if at + first + 2 <= len(data):
                    (count,) = struct.unpack_from(f"{order}H", data, at + first)
                    if 0 < count < 200 and at + first + 2 + 12 * count <= len(data):
                        found.append(Directory(at, order, at + first + 2, count))
            at = data.find(magic, at + 1)
    return found


def _change_directory(data: bytes, rng: Random) -> bytes:
    """Change an entry's tag, type, count or value, or give an entry twice."""
    found = rng.choice(tiff_directories(data))
    at = found.entries + 12 * rng.randrange(found.count)
    other = found.entries + 12 * rng.randrange(found.count)
    whole = bytearray(data)
    kind = rng.randrange(7)
    if kind == 0:
        whole[at : at + 2] = whole[other : other + 2]
    elif kind == 1:
        whole[at : at + 12] = whole[other : other + 12]
    elif kind == 2:
        struct.pack_into(f"{found.order}H", whole, at + 2, rng.choice([*range(19), 255, 65535]))
    elif kind == 3:
        struct.pack_into(f"{found.order}I", whole, at + 4, rng.choice([*_EXTREME, 2, 3, len(data)]))
    elif kind == 4:
        struct.pack_into(f"{found.order}I", whole, at + 8, rng.choice([*_EXTREME, 8, len(data) - 1, len(data)]))
    elif kind == 5:
        struct.pack_into(f"{found.order}H", whole, at + 8, rng.randrange(12))
    else:
        struct.pack_into(f"{found.order}H", whole, found.entries - 2, rng.choice([0, 1, found.count + 1, 65535]))
    return mended(bytes(whole), rng, always=True)


Damage = Callable[[bytes, Random], bytes]
