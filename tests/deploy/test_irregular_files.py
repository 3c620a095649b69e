"""Prediction waits for no pipe, reads no device and says what each of them is."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from fpcn_dist.deploy.onnx_predict import read_image
from fpcn_dist.deploy.predict import predict
from fpcn_dist.models import build_model
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.model_folder import save_model
from tests.helpers.irregular import REASONS, make_irregular


@pytest.fixture
def folder(rocks: Path, tmp_path: Path) -> Path:
    """A folder with one photograph, and what looks like some."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    shutil.copy(rocks / "marble" / "0000.jpg", folder / "good.jpg")
    make_irregular(folder)
    return folder


def test_with_torch(folder: Path, tmp_path: Path) -> None:
    model = ModelConfig(backbone="test_resnet", pretrained=False, norm="frozen_batch", hidden=16)
    recipe = Recipe(model=model, data=DataConfig(resize=40, crop=32))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", build_model(model, 3, task="contrast"), recipe, ("basalt", "dolomite", "marble"))
    text = io.StringIO()
    (one,) = predict(tmp_path / "model", [folder], tmp_path / "out", console=Console(file=text, width=200))
    assert Path(one.file).name == "good.jpg"
    for name, reason in REASONS.items():
        (line,) = [line for line in text.getvalue().splitlines() if name in line]
        assert reason in line


def test_without_torch(folder: Path) -> None:
    assert read_image(folder / "good.jpg", 40, 32, "squeeze", "bilinear").shape == (32, 32, 3)
    for name, reason in REASONS.items():
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
            read_image(folder / name, 40, 32, "squeeze", "bilinear")
