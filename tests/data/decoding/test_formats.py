"""Every kind of file: the right pixels in all orientations from every reading, or one refusal; and docs say so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fpcn_dist.data.decoding.formats.exif import upright
from tests.helpers.formats import BEGIN, DOCS, END, Reading, read_all, table
from tests.helpers.kinds_of_files import kinds

NAMES = [f"{kind.form} {kind.pixels}" for kind in kinds()]


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reading]:
    return dict(zip(NAMES, read_all(tmp_path_factory.mktemp("files"), kinds()), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_all_readings_make_the_right_pixels_or_refuse_alike(readings: dict[str, Reading], name: str) -> None:
    kind, pixels, refusals = readings[name]
    if kind.right is None:
        assert len(refusals) >= 2 and len(set(refusals.values())) == 1
        return
    assert not refusals
    for turn, found in pixels.items():
        first, *others = found.values()
        assert others and all(np.array_equal(first, other) for other in others)
        assert np.abs(first.astype(int) - upright(kind.right, turn)).mean() <= kind.apart


def test_the_table_of_the_docs_is_what_was_found(readings: dict[str, Reading]) -> None:
    written = DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert written == table(list(readings.values())), "run python -m tests.helpers.formats"


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_libraries_print_nothing_about_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    which = [kind for kind in kinds() if "CMYK" in kind.pixels or "inside" in kind.pixels or "cut short" in kind.pixels]
    assert {kind.form for kind in which} > {"JPEG", "TIFF", "PNG"}
    read_all(tmp_path, which)
    assert capfd.readouterr() == ("", "")
