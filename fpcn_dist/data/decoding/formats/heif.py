"""HEIC and AVIF, which are boxes inside boxes. How such an image is turned, it says itself, and not its EXIF."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import struct
from collections.abc import Iterator

from PIL import Image, features

from fpcn_dist.data.decoding.formats.exif import orientation_of
from fpcn_dist.data.decoding.formats.header import NO_IMAGE, Header, UnreadableError


def _version() -> str:
    try:
        return f"pillow-heif {importlib.metadata.version('pillow-heif')}"
    except importlib.metadata.PackageNotFoundError:
        return "no pillow-heif"


VERSION: str = _version()
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_MOST_ITEMS = 10_000


def is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and bool(_brands(data) & (_AVIF | _HEIC))


def _brands(data: bytes) -> set[bytes]:
    """The major brand and those that the file is compatible with."""
    end = min(int.from_bytes(data[:4], "big"), len(data), 400)
    return {data[8:12], *(data[k : k + 4] for k in range(16, end - 3, 4))}


def parse(data: bytes) -> Header:
    """Size and orientation of a HEIC or AVIF image.

    Raises:
        UnreadableError: its header is damaged, or what decodes it is not installed.
    """
    encoded = _without_exif(data)
    form = "AVIF" if _brands(data) & _AVIF else "HEIC"
    installed = features.check("avif") if form == "AVIF" else importlib.util.find_spec("pillow_heif") is not None
    if not installed:
        hint = "pip install 'fpcn-dist[heic]'"
        raise UnreadableError(f"a {form} image, which cannot be decoded here: {hint}, or convert it to JPEG")
    try:
        with open_heic(encoded) if form == "HEIC" else Image.open(io.BytesIO(encoded), formats=("AVIF",)) as image:
            # libheif has turned the image; libavif leaves that to us, and Pillow writes it where EXIF would have it.
            orientation = 1 if form == "HEIC" else orientation_of(image.info.get("exif") or b"")
            width, height = image.size
            return Header(form, width, height, orientation, encoded, image.mode)
    except Exception as error:  # whatever the libraries stumble over
        raise UnreadableError(NO_IMAGE) from error


def open_heic(data: bytes) -> Image.Image:
    """An image that is decoded when it is first looked at; its pixels are upright.

    Raises:
        Exception: of any kind; the data are damaged.
    """
    from pillow_heif import HeifImageFile

    return HeifImageFile(io.BytesIO(data))


def _without_exif(data: bytes) -> bytes:
    """The file with its EXIF item renamed, which then nobody reads."""
    changed = bytearray(data)
    for meta_start, meta_end in _boxes(data, 0, len(data), b"meta"):
        for start, end in _boxes(data, meta_start + 4, meta_end, b"iinf"):
            first = start + (6 if data[start : start + 1] == b"\0" else 8)
            for item_start, item_end in _boxes(data, first, end, b"infe"):
                # Version and flags, 4 bytes; an item id of 2, in version 3 of 4; its protection, 2; its kind.
                kind = item_start + (10 if data[item_start : item_start + 1] == b"\3" else 8)
                if data[kind : kind + 4] == b"Exif" and kind + 4 <= item_end:
                    changed[kind : kind + 4] = b"skip"
    return bytes(changed)


def _boxes(data: bytes, start: int, end: int, wanted: bytes) -> Iterator[tuple[int, int]]:
    """Where the contents of the boxes of a kind between two places begin and end."""
    for _ in range(_MOST_ITEMS):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1 and start + 16 <= end:
            (size,) = struct.unpack_from(">Q", data, content)
            content += 8
        stop = end if size == 0 else min(start + size, end)
        if stop < content:
            return
        if kind == wanted:
            yield content, stop
        start = stop
