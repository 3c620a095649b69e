"""Checking images: what is refused and why, and what the cache spares and must not spare."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.backends import open_backend
from fpcn_dist.data.decoding.formats.header import NO_IMAGE
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.check import images
from fpcn_dist.data.index.check.cache import CheckCache
from fpcn_dist.data.index.check.images import Refused, cache_file, check_images
from fpcn_dist.data.index.notices import refusal_table
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import Preempted
from fpcn_dist.runtime.preemption import Preemption
from fpcn_dist.runtime.ranks import CPU, Ranks
from tests.helpers.irregular import REASONS, make_irregular

pytestmark = pytest.mark.usefixtures("backend")

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def _encoded(form: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def _huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


BAD = {
    "cut.jpg": (_encoded("JPEG")[:-300], "the image data are truncated or damaged"),
    "no_end.jpg": (_encoded("JPEG")[:-2], "the image data are truncated or damaged"),
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"not a photograph\n" * 30, NO_IMAGE),
    "icon.jpg": (_encoded("ICO"), NO_IMAGE),
    "cut.png": (_encoded("PNG")[:-500], "the image data are truncated or damaged"),
    "no_end.png": (_encoded("PNG")[:-2], "the image data are truncated or damaged"),
    "huge.png": (
        _huge_png(),
        "its header announces 20000 x 20000 = 400,000,000 pixels, more than data.max_pixels 100,000,000",
    ),
}
GOOD = {
    "rgb.jpg": _encoded("JPEG"),
    "gray.jpg": _encoded("JPEG", "L"),
    "cmyk.jpg": _encoded("JPEG", "CMYK"),
    "progressive.jpg": _encoded("JPEG", progressive=True),
    "rgba.png": _encoded("PNG", "RGBA"),
    "palette.png": _encoded("PNG", "P"),
    "lossy.webp": _encoded("WEBP"),
    "plain.bmp": _encoded("BMP"),
    "moving.gif": _encoded("GIF"),
    "packed.tif": _encoded("TIFF", compression="tiff_lzw"),
}


def _write(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    content, reason = BAD[name]
    (check,) = check_images(Blob.of_files(_write(tmp_path, {name: content})), 100_000_000)
    assert not check.ok and check.reason == reason


@pytest.mark.parametrize("name", GOOD)
def test_good_files_pass(name: str, tmp_path: Path) -> None:
    (check,) = check_images(Blob.of_files(_write(tmp_path, {name: GOOD[name]})), 2400)
    assert check.ok and check.size == len(GOOD[name]) and len(check.digest) == 64


def test_the_bound_is_inclusive(tmp_path: Path) -> None:
    paths = _write(tmp_path, {"rgb.jpg": GOOD["rgb.jpg"]})
    assert [check_images(Blob.of_files(paths), bound)[0].ok for bound in (2399, 2400)] == [False, True]


def test_missing_file_and_folder_are_named_not_raised(tmp_path: Path) -> None:
    reasons = [check.reason for check in check_images(Blob.of_files([tmp_path / "gone.jpg", tmp_path]), 2400)]
    assert reasons == ["cannot be read (No such file or directory)", "cannot be read (Is a directory)"]


def test_order_is_that_of_the_paths(tmp_path: Path) -> None:
    contents = GOOD | {name: content for name, (content, _) in BAD.items()}
    paths = sorted(_write(tmp_path, contents), key=lambda path: path.name[::-1])
    assert [check.ok for check in check_images(Blob.of_files(paths), 10**8)] == [path.name in GOOD for path in paths]


def _damage(path: Path, keep_time: bool) -> None:
    """Overwrite with as many zeros."""
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_remembered_file_is_not_read_again_until_it_changes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    paths, cache = _write(tmp_path / "images", GOOD), tmp_path / "deep" / "cache.json"
    first = check_images(Blob.of_files(paths), 10**8, cache)
    for path in paths:
        _damage(path, keep_time=True)
    assert check_images(Blob.of_files(paths), 10**8, cache) == first and all(check.ok for check in first)
    # Another bound is another question.
    assert not any(check.ok for check in check_images(Blob.of_files(paths), 10**7, cache))
    shutil.rmtree(cache.parent)
    assert not any(check.ok for check in check_images(Blob.of_files(paths), 10**8, cache))


def test_a_changed_file_is_checked_again(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    paths, cache = _write(tmp_path / "images", GOOD), tmp_path / "cache.json"
    check_images(Blob.of_files(paths), 10**8, cache)
    os.utime(paths[0], ns=(0, paths[0].stat().st_mtime_ns - 10))
    _damage(paths[0], keep_time=True)
    found = check_images(Blob.of_files(paths), 10**8, cache)
    assert [check.ok for check in found] == [False] + [True] * (len(paths) - 1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal, also where the tests are the background job of a shell, which hears no SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_check_that_is_told_to_stop_stops_and_keeps_what_it_found(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the files keeps its decoder busy for an hour."""
    (tmp_path / "images").mkdir()
    contents = {f"{i}.jpg": b"good" for i in range(9)} | {"last.jpg": b"sleep"}
    blobs, cache = Blob.of_files(_write(tmp_path / "images", contents)), tmp_path / "cache.json"
    deadly = open_backend("torchvision")._replace(decoder="tests.helpers.deadly:Decoder")
    monkeypatch.setattr(images, "open_backend", lambda name: deadly)
    noted, note = [], CheckCache.note

    def stop_after_nine(*args: Any) -> None:
        note(*args)
        noted.append(args)
        if len(noted) == 9:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(CheckCache, "note", stop_after_nine)
    told: tuple[type[BaseException], ...] = (Preempted, KeyboardInterrupt)
    with pytest.raises(told), Preemption(Ranks(0, 1, 0, 1, CPU)):
        check_images(blobs, 10**8, cache)
    assert len(json.loads(cache.read_text())["files"]) == 9


def test_where_all_is_known_a_signal_waits_for_the_first_step(rocks: Path, tmp_path: Path) -> None:
    blobs, cache = Blob.of_files(sorted((rocks / "marble").iterdir())[:2]), tmp_path / "cache.json"
    check_images(blobs, 10**8, cache)
    with Preemption(Ranks(0, 1, 0, 1, CPU)) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert all(check.ok for check in check_images(blobs, 10**8, cache))
        assert preemption.agreed() == "SIGTERM"


def test_cache_lies_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file(Path("a")).parent == tmp_path / "fpcn-dist"
    assert cache_file(Path("a")) == cache_file(Path("b/../a")) != cache_file(Path("b"))


def test_table_names_file_and_reason() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(refusal_table([Refused("marble/[old] 3.jpg", "the file is empty")]))
    text = console.export_text()
    assert "1 image(s) refused" in text and "marble/[old] 3.jpg" in text and "the file is empty" in text


def test_a_class_folder_may_hold_what_is_no_regular_file(rocks: Path, tmp_path: Path) -> None:
    for name in ("basalt", "marble"):
        shutil.copytree(rocks / name, tmp_path / name)
    make_irregular(tmp_path / "marble")
    manifest = build_manifest(tmp_path, DataConfig(images_per_class=2, classes_per_batch=None), seed=0)
    assert {Path(path).name: reason for path, reason in manifest.refused} == REASONS
