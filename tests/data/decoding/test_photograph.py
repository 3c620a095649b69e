"""Headers, orientation and damage: what the one reading makes of files that decoders stumble over."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from fpcn_dist.data.decoding import photograph
from fpcn_dist.data.decoding.backends import open_backend
from fpcn_dist.data.decoding.formats import heif
from fpcn_dist.data.decoding.formats.exif import TURNS, orientation_of, upright
from fpcn_dist.data.decoding.formats.header import DAMAGED, NO_IMAGE, UnreadableError
from fpcn_dist.data.decoding.photograph import decode, examine
from tests.helpers.formats import decoder_of
from tests.helpers.kinds_of_files import GREY, RGB, chunk, exif_of, png, saved, tiff, with_segments

BOUND = 10_000
JPEG = saved(RGB, "JPEG", quality=95, subsampling=0)
EXIF, XMP = 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation='3'/>"
TEXT = struct.pack("<HHI4s", 282, 2, 3, b"72\0\0")
"""An entry for the resolution, as text where a fraction belongs."""


@pytest.mark.parametrize("turn", TURNS)
def test_a_turn_is_what_pillow_makes_of_it(turn: int) -> None:
    from PIL import Image, ImageOps

    image = Image.fromarray(RGB)
    image.getexif()[0x0112] = turn
    assert np.array_equal(upright(RGB, turn), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("kind", [3, 4], ids=["SHORT", "LONG"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_of_a_jpeg(order: str, kind: int) -> None:
    exif = b"Exif\0\0" + exif_of(6, order, kind)
    for segments in (
        [(EXIF, exif)],
        [(EXIF, XMP), (EXIF, exif)],
        [(0xED, b"Photoshop 3.0\0"), (EXIF, exif), (EXIF, b"Exif\0\0" + exif_of(3))],
    ):
        assert examine(with_segments(JPEG, *segments), BOUND).orientation == 6


@pytest.mark.parametrize(
    ("exif", "expected"),
    [
        (exif_of(6, count=3)[:-4], 6),  # promises more entries than there are
        (exif_of(6, entries=TEXT), 6),
        (exif_of(9), 1),
        (exif_of(0), 1),
        (exif_of(6)[:12], 1),
        (b"II*\0\xff\xff\xff\xff", 1),
        (b"II*\0\x08\0\0", 1),
        (b"Exif", 1),
        (b"", 1),
        (exif_of(6).replace(struct.pack("<HH", 0x0112, 3), struct.pack("<HH", 0x0112, 5)), 1),
    ],
)
def test_what_is_left_of_exif_counts(exif: bytes, expected: int) -> None:
    assert orientation_of(exif) == expected
    files = {
        "jpg": with_segments(JPEG, (EXIF, b"Exif\0\0" + exif)),
        "png": png(RGB, 2, 8, chunk(b"eXIf", exif)),
    }
    for name, data in files.items():
        header = examine(data, BOUND)
        assert header.orientation == expected, name
        assert exif not in header.encoded or not exif  # no decoder sees it
        for backend in ("auto", "torchvision"):
            assert decoder_of(backend).fault(data, BOUND) is None
        assert np.abs(decode(header).astype(int) - upright(RGB, expected)).mean() < 4


def test_a_webp_may_have_exif_after_a_chunk_of_odd_length() -> None:
    data = saved(RGB, "WEBP", 6, lossless=True, icc_profile=b"odd")
    at = data.index(b"ICCP")
    assert struct.unpack_from("<I", data, at + 4)[0] % 2 == 1 and data.index(b"EXIF") > at
    assert np.array_equal(decode(examine(data, BOUND)), upright(RGB, 6))


def test_text_in_a_png_is_unpacked_within_bounds() -> None:
    bomb = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 8\n" + b"00" * (50 << 20), 9))
    assert examine(png(RGB, 2, 8, bomb), BOUND).orientation == 1
    for text in (b"", b"\0", b"\0\0rubbish", b"\nexif\n"):
        data = png(RGB, 2, 8, chunk(b"zTXt", b"Raw profile type exif" + text))
        assert np.array_equal(decode(examine(data, BOUND)), RGB)


def test_a_tiff_with_one_entry_twice_is_read_by_the_first() -> None:
    """The fourth entry, Compression, has become a second ImageWidth: libraries differ about which of the two counts."""
    damaged = tiff(RGB.tobytes(), t274=6).replace(struct.pack("<HH", 259, 4), struct.pack("<HH", 256, 4))
    assert np.array_equal(decode(examine(damaged, BOUND)), upright(RGB, 6))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_odd_entries_do_not_stop_a_tiff(compression: str | None) -> None:
    data = tiff(RGB.tobytes(), t274=8, t282=b"72\0\0", t700=XMP, t33432=b"\xff\xfe", t34665=2**31)
    assert np.array_equal(decode(examine(data, BOUND)), upright(RGB, 8))


@pytest.mark.parametrize(
    "data",
    [
        JPEG[:1], JPEG[:4], JPEG[:100], JPEG[:-2], JPEG[: len(JPEG) // 2], JPEG.replace(b"\xff\xda", b"\xff\x37"),
        png(RGB, 2, 8)[:30], png(RGB, 2, 8)[:20], b"RIFF\xff\0\0\0WEBPVP8 ", b"BM" + bytes(20), b"GIF89a\1",
        b"II*\0", b"II*\0\xff\xff\xff\xff", b"II+\0" + b"\xff" * 20, tiff(GREY.tobytes(), (8,), 1)[:60],
        b"\0\0\0\x18ftypavif" + bytes(60), b"\0\0\0\x18ftypheic" + b"\xff" * 60, b"\0\0\0\1ftypmif1", b"x",
    ],
)  # fmt: skip
def test_what_is_cut_or_damaged_is_refused_alike(data: bytes) -> None:
    with pytest.raises(UnreadableError) as error:
        decode(examine(data, BOUND))
    assert str(error.value) in (DAMAGED, NO_IMAGE)
    for backend in ("auto", "torchvision"):
        assert decoder_of(backend).fault(data, BOUND) == str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: saved(RGB, "JPEG", 6),
        lambda: png(RGB, 2, 8, chunk(b"eXIf", exif_of(6))),
        lambda: saved(RGB, "WEBP", 6),
        lambda: tiff(RGB.tobytes(), t274=6),
        lambda: saved(RGB, "AVIF", 6),
        lambda: saved(GREY, "GIF"),
        lambda: saved(GREY, "BMP"),
    ],
)
def test_damage_raises_nothing_but_refusals(make: Callable[[], bytes]) -> None:
    data, rng = make(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), rng.integers(1, 5)):
            damaged[place] = rng.integers(0, 256)
        try:
            pixels = decode(examine(bytes(damaged[: rng.integers(len(data) // 2, 2 * len(data))]), BOUND))
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.size <= 3 * BOUND
        except UnreadableError:
            refused += 1
    assert refused > 0


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(RGB, "AVIF")
    monkeypatch.setattr(heif.features, "check", lambda name: False)
    with pytest.raises(UnreadableError, match=r"AVIF image, .* pip install 'fpcn-dist\[heic\]'"):
        examine(data, BOUND)
    monkeypatch.setattr(heif.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnreadableError, match=r"HEIC image, .* pip install 'fpcn-dist\[heic\]'"):
        examine(data.replace(b"avif", b"heic").replace(b"avis", b"heix"), BOUND)


def test_what_decides_is_part_of_the_version() -> None:
    assert all("Pillow" in open_backend(name).version for name in ("auto", "torchvision"))
    assert "pillow-heif" in photograph.VERSION
