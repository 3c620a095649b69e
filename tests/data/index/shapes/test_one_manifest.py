"""The same photographs in any shape: one manifest, one hash, the same batches bit for bit."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.shapes.recognise import recognise
from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.recipe.schema import DataConfig
from tests.helpers.shapes import SHAPES, as_parquet, as_tar, examples, photographs, write_parquet, write_tar

CONFIG = DataConfig(images_per_class=2, classes_per_batch=None, resize=40, crop=32, threads=1)


@pytest.fixture(params=SHAPES)
def data(request: pytest.FixtureRequest, rocks: Path, tmp_path: Path) -> Path:
    """The synthetic rocks in one of the shapes."""
    (tmp_path / "data").mkdir()
    return SHAPES[request.param](rocks, tmp_path / "data")


def _assert_same_batches(one: Manifest, other: Manifest) -> None:
    device = torch.device("cpu")
    loaders = [TrainLoader(manifest, CONFIG, 3, rank=0, world_size=1, device=device) for manifest in (one, other)]
    for _ in range(3):
        first, second = map(next, loaders)
        assert torch.equal(first.images, second.images) and torch.equal(first.image_ids, second.image_ids)
    for loader in loaders:
        loader.close()


def test_manifest_and_batches_are_those_of_the_folder(data: Path, rocks: Path) -> None:
    expected, manifest = build_manifest(rocks, CONFIG, 0), build_manifest(data, CONFIG, 0)
    assert manifest.hash == expected.hash and manifest.classes == expected.classes and not manifest.refused
    for image_id, image in enumerate(manifest.images):
        assert manifest.blob(image_id).read() == (rocks / image.path).read_bytes()
    _assert_same_batches(expected, manifest)


def test_a_written_manifest_finds_the_bytes_after_the_data_moved(data: Path, rocks: Path, tmp_path: Path) -> None:
    manifest = build_manifest(data, CONFIG, 0)
    manifest.save(tmp_path / "manifest.json")
    read = Manifest.load(tmp_path / "manifest.json")
    assert read == manifest
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    moved = dataclasses.replace(read, root=str(tmp_path / "elsewhere" / data.relative_to(tmp_path / "data")))
    for image_id in np.random.default_rng(0).permutation(len(moved.images)).tolist():
        blob = pickle.loads(pickle.dumps(moved.blob(image_id)))
        assert blob.read() == (rocks / moved.images[image_id].path).read_bytes()
        assert "elsewhere" in str(blob) and moved.images[image_id].path in str(blob)
    assert build_manifest(Path(moved.root), CONFIG, 0).hash == manifest.hash


def test_the_shape_is_named(data: Path, rocks: Path) -> None:
    named = {
        "labels.csv": "a table of images (CSV)",
        "metadata.csv": "a folder of images with a table (metadata.csv)",
        "rocks-000.tar": "3 tar shard(s)",
        "data-00000-of-00002.parquet": "2 Parquet file(s)",
    }
    folder = data if data.is_dir() else data.parent
    (expected,) = [name for file, name in named.items() if (folder / file).exists()]
    assert recognise(data, ColumnsConfig()).name == expected
    assert recognise(rocks, ColumnsConfig()).name == "a folder of images"


@pytest.mark.parametrize("make", [as_tar, as_parquet])
def test_splits_of_file_names_are_those_of_folders(make, rocks: Path, tmp_path: Path) -> None:
    """``train/basalt/0000.jpg`` in a folder is called so in train/*.tar and in train-*.parquet, too."""
    splits = {"train": slice(0, None, 2), "validation": slice(1, None, 4), "test": slice(3, None, 4)}
    folder, data, rows = tmp_path / "folder", tmp_path / "data", photographs(rocks)
    for split, part in splits.items():
        called = {"validation": "val"}.get(split, split)
        for path, _ in rows[part]:
            (folder / called / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(rocks / path, folder / called / path)
        if make is as_tar:
            write_tar(data / split / "0.tar", examples(rocks, rows[part]))
        else:
            write_parquet(data / "data" / f"{split}-00000-of-00001.parquet", rocks, rows[part])
    found = [
        sorted((c.path, c.name, c.split) for c in recognise(d, ColumnsConfig()).find().candidates)
        for d in (data, folder)
    ]
    assert found[0] == found[1] and {split for *_, split in found[0]} == {"train", "val", "test"}


def test_a_changed_shard_is_indexed_and_checked_again(rocks: Path, tmp_path: Path) -> None:
    data, rows = as_tar(rocks, tmp_path), photographs(rocks)
    before = build_manifest(data, CONFIG, 0)
    shard = data / "rocks-000.tar"
    write_tar(shard, examples(rocks, rows[0::3])[:-2])
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1_000_000))
    assert len(build_manifest(data, CONFIG, 0).images) == len(before.images) - 1
