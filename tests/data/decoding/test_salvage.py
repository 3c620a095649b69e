"""JPEGs that were cut short: refused, or shown as far as they go, by every reading alike."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpcn_dist.data.batch import BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.backends import has_dali, open_backend
from fpcn_dist.data.decoding.formats.header import DAMAGED, UnreadableError
from fpcn_dist.data.decoding.photograph import Salvager, decode, examine
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.check.salvage import SALVAGED
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.notices import Notice
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.data.views import centre_views
from fpcn_dist.deploy.onnx_predict import read_image
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError
from tests.helpers.kinds_of_files import saved

BOUND = 1_000_000
SIDE = 640
CONFIG = DataConfig(resize=SIDE, crop=SIDE, mean=(0, 0, 0), std=(1, 1, 1), on_bad_image="salvage")


def _noise() -> np.ndarray:
    """Every row needs as many bytes as the others."""
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def whole() -> bytes:
    return saved(_noise(), "JPEG", quality=80)


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(share * len(data))]


def test_the_rows_that_are_there_are_right_and_the_others_have_their_mean_colour(whole: bytes) -> None:
    expected = decode(examine(whole, BOUND))
    data = _cut(whole, 0.985)
    found = decode(examine(data, BOUND, salvage=True))
    assert found.shape == expected.shape
    rows = int(np.flatnonzero((found != expected).any(axis=(1, 2)))[0])
    assert 0.95 * SIDE <= rows < 0.985 * SIDE
    assert Salvager().fault(data, BOUND) is None
    assert (found[rows:] == expected[:rows].mean(axis=(0, 1)).round()).all()


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"progressive": True}])
def test_a_missing_end_marker_costs_nothing(options: dict[str, object]) -> None:
    data = saved(_noise(), "JPEG", quality=80, **options)
    for short in (data[:-2], data[:-1]):
        assert np.array_equal(decode(examine(short, BOUND, salvage=True)), decode(examine(data, BOUND)))
        assert Salvager().fault(short, BOUND) is None


@pytest.mark.parametrize("share", [0.5, 0.9, 0.01])
def test_too_little_is_refused_in_any_case(whole: bytes, share: float) -> None:
    with pytest.raises(UnreadableError, match=DAMAGED):
        decode(examine(_cut(whole, share), BOUND, salvage=True))


def test_a_progressive_jpeg_counts_the_rows_that_its_last_scan_has_reached() -> None:
    data = saved(_noise(), "JPEG", quality=80, progressive=True)
    expected = decode(examine(data, BOUND))
    with pytest.raises(UnreadableError, match=r"\(0 of 640 rows are there\)|rows are there"):
        decode(examine(_cut(data, 0.6), BOUND, salvage=True))
    found = decode(examine(_cut(data, 0.995), BOUND, salvage=True))
    assert np.array_equal(found[: int(0.95 * SIDE)], expected[: int(0.95 * SIDE)])


def test_all_readings_salvage_alike(whole: bytes, tmp_path: Path) -> None:
    data = saved(_noise(), "JPEG", 6, quality=80)
    path = tmp_path / "cut.jpg"
    path.write_bytes(_cut(data, 0.98))
    request = BatchRequest([Blob(str(path))], centre_views(1))
    images = [read_image(Blob(str(path)), SIDE, SIDE, "squeeze", "bilinear", salvage=True)]
    for name in ("torchvision", *(["dali"] if has_dali() else [])):
        decoding = open_backend(name).decoding(iter([request]), CONFIG, torch.device("cpu"), 1, 1)
        with contextlib.closing(decoding):
            images.append((decoding.next()[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    assert all(np.array_equal(images[0], image) for image in images[1:])
    with pytest.raises(UnreadableError, match=DAMAGED):
        read_image(Blob(str(path)), SIDE, SIDE, "squeeze", "bilinear")


@pytest.mark.usefixtures("backend")
def test_a_manifest_lists_what_was_salvaged_and_its_hash_tells_it_from_one_that_skips(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for index in range(3):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (640, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.jpg", quality=50 + index)
    for name, share in (("a", 0.99), ("b", 0.5)):
        path = tmp_path / name / "2.jpg"
        path.write_bytes(_cut(path.read_bytes(), share))
    config = DataConfig(resize=32, crop=32, images_per_class=1, classes_per_batch=None, val_fraction=0.4, threads=1)
    skipped = build_manifest(tmp_path, config, seed=0)
    assert [path for path, _ in skipped.refused] == ["a/2.jpg", "b/2.jpg"] and skipped.notices == ()
    found = build_manifest(tmp_path, config.changed(on_bad_image="salvage"), seed=0)
    assert found.notices == (Notice("a/2.jpg", SALVAGED),)
    ((path, reason),) = found.refused
    assert path == "b/2.jpg" and reason.startswith(DAMAGED) and "rows are there" in reason
    assert Manifest.from_json(found.to_json()) == found and found.hash != skipped.hash
    ids = np.flatnonzero([image.path == "a/2.jpg" for image in found.images])
    cut = EvalLoader(
        [found.blob(int(ids[0]))],
        np.zeros(1),
        ids,
        config.changed(on_bad_image="salvage"),
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
    )
    assert sum(len(batch.image_ids) for batch in cut) == 1
    with pytest.raises(UserError, match="--data"):
        build_manifest(tmp_path, config.changed(on_bad_image="fail"), seed=0)
