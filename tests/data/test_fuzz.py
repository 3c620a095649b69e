"""Damaged files are read alike by all, and kill nothing: ``tests/data/fuzz.py`` in small."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.data.fuzz import MAX_PIXELS, Readings, make, run
from tests.helpers.photographs import FORMS

pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_damaged_files_are_read_alike() -> None:
    faults, decided = run(make(number) for number in range(800))
    assert not faults, "\n".join(f"case {case.number} ({case.form}): {what}" for case, what in faults)
    assert set(decided) == {f"{form} {verdict}" for form in FORMS for verdict in ("shown", "refused")}


@pytest.fixture(scope="module")
def readings() -> Iterator[Readings]:
    readings = Readings()
    yield readings
    readings.close()


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((48, 48)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


FOUND = {
    "JFIF without length": _jpeg().replace(b"\xff\xe0\x00\x10", b"\xff\xe0\x00\x00", 1),
    "JFIF cut short": _jpeg().replace(b"\xff\xe0\x00\x10", b"\xff\xe0\x00\x07", 1),
    "an empty segment of Adobe's": _jpeg().replace(b"\xff\xdb", b"\xff\xee\x00\x02\xff\xdb", 1),
}
"""What the fuzz has found to be read differently, and is shown by all."""


def test_a_jpeg_of_two_sizes_is_refused_alike(readings: Readings) -> None:
    data = _jpeg()
    frame = data[data.index(b"\xff\xc0") :][:19]
    twice = data.replace(frame, frame + frame.replace(b"\0\x30\0\x30", b"\0\x50\0\x30"))
    assert len(twice) == len(data) + 19
    assert readings.fault(twice, MAX_PIXELS) == "refused: the image data are truncated or damaged"


def test_a_segment_within_a_scan_is_read_alike(readings: Readings) -> None:
    data = _jpeg()
    for place in range(data.index(b"\xff\xda") + 20, len(data) - 20, 7):
        broken = data[:place] + b"\xff\xc4\x00\x0b\x33\x33" + data[place:]
        assert readings.fault(broken, MAX_PIXELS).startswith(("shown", "refused"))


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_read_alike(name: str, readings: Readings) -> None:
    assert readings.fault(FOUND[name], MAX_PIXELS) == "shown"


def test_readings_that_differ_are_found(readings: Readings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert readings.fault(_jpeg(), MAX_PIXELS) == "shown"
    assert readings.fault(_jpeg()[:-300], MAX_PIXELS) == "refused: the image data are truncated or damaged"
    with monkeypatch.context() as patch:
        patch.setattr(readings, "_by_onnx", lambda blob: readings._by_torch(readings._backends[0], blob) + 3)
        assert "pixels differ" in readings.fault(_jpeg(), MAX_PIXELS)
    with monkeypatch.context() as patch:
        patch.setattr(type(readings._decoders[0]), "fault", lambda *_: "the file is empty")
        assert "decide differently" in readings.fault(_jpeg(), MAX_PIXELS)
