"""The benchmark of shapes of data sets: every loader sees all photographs, ours from each shape."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("webdataset")

import numpy as np
import torch

from benchmarks._augmentations import by_v2
from benchmarks._shapes import Stored, others, reading
from fpcn_dist.recipe.schema import DataConfig

CONFIG = DataConfig(resize=24, crop=16, threads=1)


@pytest.fixture
def stored(rocks: Path, tmp_path: Path) -> Stored:
    return Stored.write([str(path) for path in sorted(rocks.rglob("*.jpg"))[::3]], tmp_path)


def test_each_shape_holds_the_photographs(stored: Stored) -> None:
    contents = [file.read_bytes() for file in stored.files]
    for blobs in stored.blobs(CONFIG).values():
        assert sorted(blob.read() for blob in blobs) == sorted(contents)


@pytest.mark.slow
def test_others_show_each_photograph_once(stored: Stored) -> None:
    load = by_v2(CONFIG.changed(flip=False, crop=24))
    expected = np.sort([load(file.read_bytes()).sum() for file in stored.files])
    for name, batches in others(stored, lambda data: load(data).sum(), 5, 1).items():
        assert np.allclose(np.sort(torch.cat(list(batches)).numpy()), expected, rtol=1e-4, atol=0.1), name


def test_table_of_reading(stored: Stored) -> None:
    table = reading(stored.blobs(CONFIG), 1, 2)
    assert table.row_count == 6 and [str(cell) for cell in table.columns[0].cells][::2] == ["files", "tar", "Parquet"]
