"""One picture in every kind of file that people have."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fpcn_dist.data.decoding.formats.exif import ORIENTATION

SIDE = 32

Pixels = NDArray[np.uint8]


def _picture() -> Pixels:
    """[32, 32, 3] uint8, smooth, and like none of its turned or mirrored images."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([7 * x + y, 3 * y + 40, 200 - 2 * x - 4 * y + (x * y) // 16], axis=2).clip(0, 255).astype(np.uint8)


RGB = _picture()
GREY = np.asarray(Image.fromarray(RGB).convert("L"))
ALPHA = (GREY // 2 + 100).astype(np.uint8)


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        form: the format, as the table calls it.
        pixels: the mode, as the table calls it.
        make: the file of the picture for an EXIF orientation, of which the stored pixels are not turned.
        right: [32, 32, 3] as stored; ``None`` where the file is to be refused.
        turns: whether it can hold an orientation.
        apart: mean difference in grey levels from the picture that the encoding explains.
    """

    form: str
    pixels: str
    make: Callable[[int], bytes]
    right: Pixels | None = RGB
    turns: bool = False
    apart: float = 0.0


def saved(pixels: Pixels | Image.Image, form: str, orientation: int = 1, **options: object) -> bytes:
    """By Pillow, with EXIF where the picture is turned."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if orientation > 1:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif.tobytes() if form == "HEIF" else exif  # pillow-heif would not look for an orientation
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif_of(orientation: int, order: str = "<", kind: int = 3, entries: bytes = b"", count: int | None = None) -> bytes:
    """EXIF data that hold an orientation of type ``kind`` (3: SHORT, 4: LONG), then other entries."""
    value = struct.pack(f"{order}HH", orientation, 0) if kind == 3 else struct.pack(f"{order}I", orientation)
    directory = struct.pack(f"{order}HHI", ORIENTATION, kind, 1) + value + entries
    number = len(directory) // 12 if count is None else count
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return start + struct.pack(f"{order}H", number) + directory + bytes(4)


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with further segments, (marker, content), behind its first marker."""
    added = [b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content for marker, content in segments]
    return jpeg[:2] + b"".join(added) + jpeg[2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: NDArray, colour: int, bits: int, *chunks: bytes) -> bytes:
    """A PNG of whole samples [H, W] or [H, W, C], with further chunks before its pixels."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2" if bits == 16 else np.uint8).reshape(height, -1)
    packed = [rows_of_bits(row, bits) if bits < 8 else row.tobytes() for row in rows]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def rows_of_bits(row: NDArray, bits: int) -> bytes:
    """Samples of fewer than 8 bits, packed."""
    each = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(each.ravel()).tobytes()


def tiff(
    content: bytes,
    bits: tuple[int, ...] = (8, 8, 8),
    photometric: int = 2,
    *,
    order: str = "<",
    big: bool = False,
    **tags,
) -> bytes:
    """A TIFF of one strip; tags as t274=6, lists of SHORTs as tuples, further data as bytes."""
    entries = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 0, 277: len(bits), 278: SIDE}
    entries |= {279: len(content)} | {int(name[1:]): value for name, value in tags.items() if value is not None}
    number, field = ("Q", 8) if big else ("I", 4)
    start = 16 if big else 8
    after = start + (8 if big else 2) + (20 if big else 12) * len(entries) + field
    entries[273] = after
    body, extra = b"", content
    for tag, value in sorted(entries.items()):
        if isinstance(value, int):
            kind, count, raw = 4, 1, struct.pack(f"{order}I", value)
        elif isinstance(value, tuple):
            kind, count, raw = 3, len(value), struct.pack(f"{order}{len(value)}H", *value)
        else:
            kind, count, raw = (2 if tag in (282, 283) else 7), len(value), value
        if len(raw) > field:
            raw, extra = struct.pack(order + number, after + len(extra)), extra + raw + b"\0" * (len(raw) % 2)
        body += struct.pack(f"{order}HH{number}", tag, kind, count) + raw.ljust(field, b"\0")
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(f"{order}HHHQQ", 43, 8, 0, 16, len(entries))
    else:
        head = mark + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + body + bytes(field) + extra


def _three(grey: NDArray) -> Pixels:
    return np.repeat(np.asarray(grey, dtype=np.uint8)[:, :, None], 3, axis=2)


def _jpegs() -> Iterator[Kind]:
    def kind(pixels: str, source: Pixels | Image.Image = RGB, right: Pixels = RGB, **options: object) -> Kind:
        options = {"quality": 95} | options
        return Kind("JPEG", pixels, lambda turn: saved(source, "JPEG", turn, **options), right, True, 4)

    plain = saved(RGB, "JPEG", quality=95)
    yield kind("grey", GREY, _three(GREY))
    yield kind("YCbCr 4:4:4", subsampling=0)
    yield kind("YCbCr 4:2:2", subsampling=1)
    yield kind("YCbCr 4:2:0", subsampling=2)
    yield kind("YCbCr, progressive", progressive=True)
    yield kind("YCbCr, restart markers", restart_marker_rows=1)
    yield kind("RGB", keep_rgb=True)
    inks = Image.fromarray(RGB).convert("CMYK")
    yield kind("CMYK", inks)
    negative = np.asarray(Image.fromarray(255 - RGB).convert("YCbCr"))
    planes = np.concatenate([255 - negative, np.zeros_like(GREY)[:, :, None]], axis=2)
    stored = Image.frombytes("CMYK", (SIDE, SIDE), planes.tobytes())

    def ycck(turn: int) -> bytes:
        made = saved(stored, "JPEG", turn, quality=95)
        at = made.index(b"Adobe") + 11
        return made[:at] + b"\2" + made[at + 1 :]

    yield Kind("JPEG", "YCCK", ycck, RGB, True, 4)
    other = [Image.fromarray(255 - RGB)]
    yield Kind("JPEG", "several images (MPO)", lambda turn: _mpo(turn, other), RGB, True, 4)
    yield Kind(
        "JPEG",
        "with data behind its end",
        lambda turn: saved(RGB, "JPEG", turn, quality=95) + RGB.tobytes(),
        RGB,
        True,
        4,
    )
    yield Kind("JPEG", "12 bits", lambda turn: _patched(plain, b"\xff\xc0\x00\x11\x08", 4, 12), None)
    yield Kind("JPEG", "lossless", lambda turn: _patched(plain, b"\xff\xc0\x00\x11\x08", 1, 0xC3), None)
    yield Kind("JPEG", "without its end marker", lambda turn: plain[:-2], None)
    yield Kind("JPEG", "cut short", lambda turn: plain[:-200], None)


def _mpo(turn: int, others: list[Image.Image]) -> bytes:
    return saved(RGB, "MPO", turn, save_all=True, append_images=others, quality=95)


def _patched(data: bytes, at: bytes, offset: int, value: int) -> bytes:
    place = data.index(at) + offset
    return data[:place] + bytes([value]) + data[place + 1 :]


def _pngs() -> Iterator[Kind]:
    def kind(pixels: str, samples: NDArray, colour: int, bits: int, right: Pixels, *chunks: bytes) -> Kind:
        def make(turn: int) -> bytes:
            return png(samples, colour, bits, *chunks, *([chunk(b"eXIf", exif_of(turn))] if turn > 1 else []))

        return Kind("PNG", pixels, make, right, True)

    def deep(*channels: NDArray) -> NDArray:
        return np.dstack([channel.astype(np.uint16) * 257 for channel in channels]).squeeze()

    for bits in (1, 2, 4):
        levels = GREY >> (8 - bits)
        yield kind(f"grey of {bits} bit{'s'[: bits - 1]}", levels, 0, bits, _three(levels * (255 // (2**bits - 1))))
    yield kind("grey of 8 bits", GREY, 0, 8, _three(GREY))
    yield kind("grey of 16 bits", deep(GREY), 0, 16, _three(GREY))
    yield kind("grey and alpha", np.dstack([GREY, ALPHA]), 4, 8, _three(GREY))
    yield kind("grey and alpha of 16 bits", deep(GREY, ALPHA), 4, 16, _three(GREY))
    yield kind("RGB of 8 bits", RGB, 2, 8, RGB)
    yield kind("RGB of 16 bits", deep(RGB), 2, 16, RGB)
    yield kind("RGB and alpha", np.dstack([RGB, ALPHA]), 6, 8, RGB)
    yield kind("RGB and alpha of 16 bits", deep(RGB, ALPHA), 6, 16, RGB)
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    yield kind("a palette", GREY, 3, 8, palette[GREY], chunk(b"PLTE", palette.tobytes()))
    shown = [chunk(b"PLTE", palette.tobytes()), chunk(b"tRNS", bytes(range(256)))]
    yield kind("a palette with transparency", GREY, 3, 8, palette[GREY], *shown)
    small = GREY >> 4
    yield kind("a palette of 16 colours", small, 3, 4, palette[small], chunk(b"PLTE", palette[:16].tobytes()))

    def in_text(turn: int) -> bytes:
        exif = b"Exif\0\0" + exif_of(turn)
        text = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
        return png(RGB, 2, 8, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))

    yield Kind("PNG", 'EXIF as text ("Raw profile type exif")', in_text, RGB, True)
    cut = exif_of(6, count=3)[:-4]
    turned = np.rot90(RGB, -1)
    yield Kind("PNG", "EXIF cut short", lambda turn: png(RGB, 2, 8, chunk(b"eXIf", cut)), turned)
    yield Kind("PNG", "cut short", lambda turn: png(RGB, 2, 8)[:-12], None)


def _webps_and_bitmaps() -> Iterator[Kind]:
    clear = np.dstack([RGB, ALPHA])
    yield Kind("WebP", "lossy", lambda turn: saved(RGB, "WEBP", turn, quality=95), RGB, True, 6)
    yield Kind("WebP", "lossless", lambda turn: saved(RGB, "WEBP", turn, lossless=True), RGB, True)
    yield Kind(
        "WebP",
        "lossless, with alpha",
        lambda turn: saved(clear, "WEBP", turn, lossless=True, exact=True),
        RGB,
        True,
    )
    yield Kind(
        "WebP",
        "EXIF after a chunk of odd length",
        lambda turn: saved(RGB, "WEBP", turn, lossless=True, icc_profile=b"odd"),
        RGB,
        True,
    )
    moving = [Image.fromarray(255 - RGB)]
    yield Kind(
        "WebP",
        "moving: its first frame",
        lambda turn: saved(RGB, "WEBP", turn, lossless=True, save_all=True, append_images=moving),
        RGB,
        True,
    )
    yield Kind("WebP", "cut short", lambda turn: saved(RGB, "WEBP", lossless=True)[:-20], None)
    bits = Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)
    yield Kind("BMP", "1 bit", lambda turn: saved(bits, "BMP"), _three(np.asarray(bits) * 255))
    yield Kind("BMP", "grey of 8 bits", lambda turn: saved(GREY, "BMP"), _three(GREY))
    few = Image.fromarray(RGB).quantize(64)
    yield Kind("BMP", "a palette", lambda turn: saved(few, "BMP"), np.asarray(few.convert("RGB")))
    yield Kind("BMP", "RGB", lambda turn: saved(RGB, "BMP"))
    yield Kind("BMP", "RGB and alpha", lambda turn: saved(clear, "BMP"))
    yield Kind("BMP", "cut short", lambda turn: saved(RGB, "BMP")[:-4], None)
    yield Kind("GIF", "a palette", lambda turn: saved(few, "GIF"), np.asarray(few.convert("RGB")))
    frames = [Image.fromarray(255 - RGB).quantize(64)]
    yield Kind(
        "GIF",
        "moving: its first frame",
        lambda turn: saved(few, "GIF", save_all=True, append_images=frames),
        np.asarray(few.convert("RGB")),
    )
    yield Kind("GIF", "cut short", lambda turn: saved(few, "GIF")[:-40], None)


def _tiffs() -> Iterator[Kind]:
    def kind(
        pixels: str, content: NDArray | bytes, right: Pixels | None, bits=(8, 8, 8), photometric=2, **tags
    ) -> Kind:
        data = content if isinstance(content, bytes) else content.tobytes()
        make = lambda turn: tiff(data, bits, photometric, t274=turn, **tags)  # noqa: E731
        return Kind("TIFF", pixels, make, right, right is not None)

    def packed(levels: NDArray, bits: int) -> bytes:
        return b"".join(rows_of_bits(row, bits) for row in levels)

    deep, grey3, clear = GREY.astype("<u2") * 257, _three(GREY), np.dstack([RGB, ALPHA])
    for bits in (1, 2, 4):
        levels = GREY >> (8 - bits)
        right = _three(levels * (255 // (2**bits - 1)))
        yield kind(f"grey of {bits} bit{'s'[: bits - 1]}", packed(levels, bits), right, (bits,), 1)
    yield kind("grey of 8 bits", GREY, grey3, (8,), 1)
    yield kind("grey of 8 bits, white is 0", 255 - GREY, grey3, (8,), 0)
    yield kind("grey of 16 bits", deep, grey3, (16,), 1)
    yield kind("grey of 16 bits, big-endian", deep.astype(">u2"), grey3, (16,), 1, order=">")
    yield kind("grey of 16 bits, white is 0", deep, None, (16,), 0)
    for name, form, dtype in (("signed", 2, "i1"), ("signed", 2, "<i2"), ("", 1, "<u4"), ("float", 3, "<f4")):
        size = np.dtype(dtype).itemsize * 8
        words = " ".join(filter(None, ["grey of", f"{size}", name, "bits"]))
        yield kind(words, (GREY // 2).astype(dtype), None, (size,), 1, t339=(form,))
    yield kind("grey and alpha", np.dstack([GREY, ALPHA]), grey3, (8, 8), 1, t338=(2,))
    yield kind("grey and an unnamed channel", np.dstack([GREY, ALPHA]), grey3, (8, 8), 1, t338=(0,))
    yield kind("RGB of 8 bits", RGB, RGB)
    yield kind("RGB of 8 bits, big-endian", RGB, RGB, order=">")
    yield kind("RGB of 8 bits, BigTIFF", RGB, RGB, big=True)
    planes = np.ascontiguousarray(RGB.transpose(2, 0, 1))
    strips = tuple(SIDE * SIDE * k for k in range(3))
    yield Kind("TIFF", "RGB of 8 bits, in planes", lambda turn: _planar(planes, strips, turn), RGB, True)
    yield kind("RGB of 16 bits", RGB.astype("<u2") * 257, RGB, (16, 16, 16))
    yield kind("RGB and alpha", clear, RGB, (8,) * 4, t338=(2,))
    premultiplied = np.dstack([np.zeros_like(RGB), ALPHA * 0 + 255])
    premultiplied[..., :3] = RGB
    yield kind("RGB times alpha", premultiplied, RGB, (8,) * 4, t338=(1,))
    yield kind("RGB of 32 float bits", RGB.astype("<f4"), None, (32,) * 3, t339=(3, 3, 3))
    palette = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    colours = tuple(palette.T.astype(int).ravel() * 257)
    yield kind("a palette", GREY, palette[GREY], (8,), 3, t320=tuple(int(c) for c in colours))
    inks = Image.fromarray(RGB).convert("CMYK")
    yield kind("CMYK of 8 bits", np.asarray(inks), RGB, (8,) * 4, 5)
    yield kind("CMYK of 16 bits", np.asarray(inks).astype("<u2") * 257, RGB, (16,) * 4, 5)
    yield kind("CIE L*a*b*", RGB, None, photometric=8)
    yield kind("YCbCr, not compressed", RGB, None, photometric=6)
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        words = {"tiff_lzw": "LZW", "tiff_adobe_deflate": "deflate", "packbits": "PackBits"}[name]
        make = lambda turn, name=name: saved(RGB, "TIFF", turn, compression=name)  # noqa: E731
        yield Kind("TIFF", f"{words} inside", make, RGB, True)
    jpeg = lambda turn: saved(RGB, "TIFF", turn, compression="jpeg", quality=95)  # noqa: E731
    yield Kind("TIFF", "JPEG inside", jpeg, RGB, True, 4)
    fax = Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)
    group4 = lambda turn: saved(fax, "TIFF", turn, compression="group4")  # noqa: E731
    yield Kind("TIFF", "CCITT group 4 inside", group4, _three(np.asarray(fax) * 255), True)
    for name, number in (("old-style JPEG", 6), ("JPEG 2000", 34712), ("WebP", 50001), ("JPEG XL", 50002)):
        yield kind(f"{name} inside", RGB, None, t259=number)
    text = lambda turn: tiff(RGB.tobytes(), t274=turn, t282=b"72\0\0", t283=b"72 dpi\0\0")  # noqa: E731
    yield Kind("TIFF", "resolution as text", text, RGB, True)
    yield Kind("TIFF", "cut short", lambda turn: tiff(GREY.tobytes(), (8,), 1)[:-40], None)


def _planar(planes: Pixels, strips: tuple[int, ...], turn: int) -> bytes:
    """Its three offsets lie behind its pixels."""
    draft = tiff(planes.tobytes(), t274=turn, t284=2, t273=0, t279=(SIDE * SIDE,) * 3)
    start = draft.index(planes.tobytes())
    offsets = struct.pack("<3I", *(start + strip for strip in strips))
    at = draft.index(struct.pack("<HH", 273, 4))
    return draft[: at + 4] + struct.pack("<II", 3, len(draft)) + draft[at + 12 :] + offsets


def _heifs() -> Iterator[Kind]:
    def heic(turn: int) -> bytes:
        import pillow_heif

        pillow_heif.register_heif_opener()
        return saved(RGB, "HEIF", turn, quality=95)

    yield Kind("HEIC", "8 bits", heic, RGB, True, 6)
    yield Kind("AVIF", "8 bits", lambda turn: saved(RGB, "AVIF", turn, quality=95), RGB, True, 6)


def kinds() -> list[Kind]:
    """All kinds of files that the table knows."""
    return [*_jpegs(), *_pngs(), *_webps_and_bitmaps(), *_tiffs(), *_heifs()]
