"""The shape of a folder is told without what commands have written into it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fpcn_dist.data.index.shapes.recognise import recognise
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.runtime.errors import UserError


def _touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_outputs_beside_shards_are_no_classes(tmp_path: Path) -> None:
    _touch(tmp_path, "shard-0.tar", "runs/x/recipe.yaml", "runs/x/manifest.json", "runs/x/samples/1.jpg")
    _touch(tmp_path, "predictions/predictions.json", "predictions/predictions.csv", "predictions/overlays/1.png")
    assert recognise(tmp_path, ColumnsConfig()).name == "1 tar shard(s)"


def test_shards_in_outputs_are_no_data(tmp_path: Path) -> None:
    _touch(tmp_path, "a/1.jpg", "b/1.jpg", "runs/x/bank.json", "runs/x/written", "runs/x/0.tar")
    assert recognise(tmp_path, ColumnsConfig()).name == "a folder of images"


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)  # root may read any folder
    with pytest.raises(UserError, match=r"it cannot be read whole: the folder itself \(Permission denied\)"):
        recognise(tmp_path, ColumnsConfig()).find()
