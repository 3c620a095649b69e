"""Prediction on files that a user might name, with a real export and the real loader."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fpcn_dist.data.index.check.salvage import SALVAGED
from fpcn_dist.deploy import onnx_backbone
from fpcn_dist.deploy.predict import Prediction, overlay_names, predict
from fpcn_dist.models import build_model
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.model_folder import load_model, save_model
from fpcn_dist.runs.report.overlay import CONTOUR
from fpcn_dist.runtime.errors import UserError

CLASSES = ("basalt", "dolomite", "marble")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(
        model=ModelConfig(backbone="resnet18", pretrained=False, hidden=16, theta=0.2),
        data=DataConfig(resize=104, crop=96),
    )
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, build_model(recipe.model, 3, task="contrast"), recipe, CLASSES)
    return folder


def _predict(model_dir: Path, paths: list[Path], output: Path) -> tuple[list[Prediction], str]:
    text = io.StringIO()
    return predict(model_dir, paths, output, console=Console(file=text, width=400)), text.getvalue()


def test_files_and_folders(model_dir: Path, rocks: Path, tmp_path: Path) -> None:
    single = rocks / "marble" / "0003.jpg"
    predictions, text = _predict(model_dir, [single, rocks / "basalt", single], tmp_path)
    assert [one.file for one in predictions] == [str(single), *map(str, sorted((rocks / "basalt").iterdir()))]
    for one in predictions:
        assert tuple(one.probabilities) == CLASSES and sum(one.probabilities.values()) == pytest.approx(1)
        assert one.predicted == max(one.probabilities, key=one.probabilities.__getitem__)
        assert 0 < one.object_share <= 1 and str(one.file) in text

    assert json.loads((tmp_path / "predictions.json").read_text()) == [one.__dict__ for one in predictions]
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [one.file for one in predictions]
    for row, one in zip(rows, predictions, strict=True):
        assert row["predicted"] == one.predicted and row["overlay"] == one.overlay
        assert float(row["probability marble"]) == pytest.approx(one.probabilities["marble"], abs=1e-6)
    assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == sorted(one.overlay for one in predictions)


def test_many_files_go_through_onnxruntime_with_the_same_results(
    model_dir: Path, rocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    expected, _ = _predict(model_dir, [rocks / "basalt"], tmp_path / "eager")
    assert "onnxruntime" not in capsys.readouterr().out
    monkeypatch.setattr(onnx_backbone, "WORTH_EXPORTING", len(expected))
    found, _ = _predict(model_dir, [rocks / "basalt"], tmp_path / "onnxruntime")
    assert "frozen backbone: onnxruntime" in capsys.readouterr().out
    for one, other in zip(found, expected, strict=True):
        assert (one.predicted, one.object_share) == (other.predicted, other.object_share)
        assert list(one.probabilities.values()) == pytest.approx(list(other.probabilities.values()), abs=1e-4)
    a, b = (sorted((tmp_path / name / "overlays").iterdir()) for name in ("eager", "onnxruntime"))
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]


def test_numbers_are_those_of_the_model_on_the_same_pixels(model_dir: Path, tmp_path: Path) -> None:
    """A flat image has the same pixels whatever the resampling, so the preprocessing can be written out here."""
    colour = np.array([180, 90, 40], dtype=np.uint8)
    Image.fromarray(np.broadcast_to(colour, (104, 130, 3))).save(tmp_path / "flat.png")
    (prediction,), _ = _predict(model_dir, [tmp_path / "flat.png"], tmp_path / "out")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (torch.tensor(colour) / 255 - mean) / std
    model, _ = load_model(model_dir)
    with torch.inference_mode():
        expected = model(normalised.view(1, 3, 1, 1).expand(1, 3, 96, 96)).softmax(dim=1)[0]
    torch.testing.assert_close(torch.tensor(list(prediction.probabilities.values())), expected, rtol=1e-3, atol=1e-4)


def test_the_overlay_shows_the_crop_inside_the_region(model_dir: Path, rocks: Path, tmp_path: Path) -> None:
    path = rocks / "dolomite" / "0001.jpg"
    (prediction,), _ = _predict(model_dir, [path], tmp_path)
    overlay = np.asarray(Image.open(tmp_path / "overlays" / prediction.overlay)).astype(int)
    assert overlay.shape == (96, 96, 3)
    resized = Image.open(path).convert("RGB").resize((104, 104), Image.Resampling.BILINEAR)
    crop = np.asarray(resized.crop((4, 4, 100, 100))).astype(int)
    kept = (np.abs(overlay - crop).max(axis=2) <= 12).mean()
    outline = (overlay == CONTOUR).all(axis=2).mean()
    assert 0 < outline < 0.5
    assert kept + outline == pytest.approx(prediction.object_share, abs=0.1)


def test_same_names_in_several_folders_all_get_an_overlay(model_dir: Path, rocks: Path, tmp_path: Path) -> None:
    predictions, _ = _predict(model_dir, [rocks / name / "0000.jpg" for name in CLASSES], tmp_path)
    overlays = [one.overlay for one in predictions]
    assert len(set(overlays)) == 3
    pixels = [(tmp_path / "overlays" / name).read_bytes() for name in overlays]
    assert len(set(pixels)) == 3


def test_overlay_names_are_stable_and_differ_in_any_case() -> None:
    names = overlay_names([Path("a/x.jpg"), Path("b/X.png"), Path("a/y.jpg"), Path("a/x.png")])
    assert len({name.lower() for name in names}) == 4 and names[2] == "y.png"
    assert overlay_names([Path("b/X.png"), Path("c/x.png")])[0] == names[1]


def test_bad_files_are_listed_and_the_rest_is_classified(model_dir: Path, rocks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    good = shutil.copy(rocks / "marble" / "0000.jpg", folder / "good [1].jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a photograph")
    (folder / "cut.jpg").write_bytes(Path(good).read_bytes()[:-400])
    (folder / "notes.txt").write_text("is not looked at")
    predictions, text = _predict(model_dir, [folder], tmp_path / "out")
    assert [Path(one.file).name for one in predictions] == ["good [1].jpg"]
    for name in ("empty.jpg", "text.jpg", "cut.jpg", "good [1].jpg"):
        assert name in text
    assert "notes.txt" not in text


def test_salvaged_files_are_classified_and_listed(model_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["preprocessing"]["on_bad_image"] = "salvage"
    (folder / "config.json").write_text(json.dumps(config))
    pixels = torch.randint(256, (640, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: round(0.99 * len(whole))])
    (one,), text = _predict(folder, [tmp_path / "cut.jpg"], tmp_path / "out")
    assert Path(one.file).name == "cut.jpg" and SALVAGED in text


def test_the_bound_of_pixels_is_that_of_the_training(model_dir: Path, rocks: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    assert config["preprocessing"].pop("max_pixels") == DataConfig().max_pixels
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder)[1].preprocessing.max_pixels == DataConfig().max_pixels, "of an older version"
    config["preprocessing"]["max_pixels"] = 96 * 96
    (folder / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (97, 96)).save(tmp_path / "large.png")
    Image.new("RGB", (96, 96)).save(tmp_path / "small.png")
    (one,), text = _predict(folder, [tmp_path / "large.png", tmp_path / "small.png"], tmp_path / "out")
    assert Path(one.file).name == "small.png" and "large.png" in text


def test_memory_for_no_image_at_all_is_refused(model_dir: Path, rocks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max-decoded-mib 0: is not above 0"):
        predict(model_dir, [rocks], tmp_path, max_decoded_mib=0)


def test_the_table_stays_short_and_counts_the_rest(model_dir: Path, rocks: Path, tmp_path: Path) -> None:
    predictions, text = _predict(model_dir, [rocks], tmp_path)
    assert len(predictions) == 72 and len(json.loads((tmp_path / "predictions.json").read_text())) == 72
    assert "40 of 72 files shown" in text and text.count(".jpg") == 40


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "images: none were given"),
        (["nowhere.jpg"], "nowhere.jpg: there is no such file or folder"),
        (["bare"], "bare: holds no images"),
        (["bad.jpg"], r"images: none of 1 file\(s\) can be read"),
    ],
)
def test_nothing_to_classify_is_an_error(model_dir: Path, tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bad.jpg").write_text("text")
    with pytest.raises(UserError, match=message):
        _predict(model_dir, [tmp_path / name for name in names], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_an_error(model_dir: Path, rocks: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"--output .*out: "):
        _predict(model_dir, [rocks / "marble" / "0000.jpg"], tmp_path / "out")
