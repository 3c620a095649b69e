"""Prediction with an exported ONNX model, on files that a user might name: as with PyTorch, but without it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from rich.console import Console

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.deploy import onnx_predict
from fpcn_dist.deploy.onnx_graph import ExportableModel, to_onnx
from fpcn_dist.deploy.predict import predict
from fpcn_dist.models import build_model
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.model_folder import load_model, save_model
from fpcn_dist.runs.report.overlay import to_pixels
from fpcn_dist.runtime.errors import UserError

pytestmark = pytest.mark.slow

CLASSES = ("basalt", "dolomite", "marble")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.safetensors, config.json and model.onnx."""
    recipe = Recipe(
        model=ModelConfig(backbone="test_resnet", pretrained=False, hidden=16, theta=0.2),
        data=DataConfig(resize=104, crop=96),
    )
    torch.manual_seed(5)
    model = build_model(recipe.model, 3, task="contrast")
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, model, recipe, CLASSES)
    proto, _ = to_onnx(ExportableModel(model), load_model(folder)[1])
    onnx.save(proto, folder / "model.onnx")
    return folder


@pytest.fixture
def model_file(model_dir: Path) -> Path:
    return model_dir / "model.onnx"


def _photographs(folder: Path) -> list[Path]:
    """A photograph in every form that a decoder may treat in its own way."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((233, 171)))
    noise = np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8)
    colour = Image.fromarray(noise)
    grey = colour.convert("L")
    clear = colour.copy()
    clear.putalpha(grey)
    plain = {
        "rgb.png": colour,
        "grey.png": grey,
        "grey.jpg": grey,
        "palette.png": colour.convert("P"),
        "alpha.png": clear,
        "grey-alpha.png": grey.convert("LA"),
        "bits.png": grey.convert("1"),
        "cmyk.jpg": colour.convert("CMYK"),
        "lossy.webp": colour,
        "rgb.bmp": colour,
        "rgb.tif": colour,
        "rgb.jpg": colour,
        "deep.png": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
    }
    for name, image in plain.items():
        image.save(folder / name)
    colour.save(folder / "progressive.jpg", progressive=True, quality=40, subsampling=2)
    colour.save(folder / "packed.tif", compression="tiff_lzw")
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        colour.save(folder / f"turned{orientation}.jpg", exif=exif)
    return sorted(folder.iterdir())


def test_pillow_makes_the_pixels_of_evaluation(tmp_path: Path) -> None:
    files = _photographs(tmp_path)
    ids = np.arange(len(files))
    cubic = {"interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    # Odd sizes: the centre is rounded.
    for resize, fit, own in itertools.product((104, 97), ("squeeze", "pad", "short_side"), ({}, cubic)):
        config = DataConfig(resize=resize, crop=64, fit=fit, threads=1, **own)
        loader = EvalLoader(Blob.of_files(files), ids, ids, config, rank=0, world_size=1, device=torch.device("cpu"))
        (batch,) = loader
        for file, image in zip(files, batch.images, strict=True):
            pixels = onnx_predict.read_image(Blob(str(file)), resize, 64, fit, config.preprocessing.interpolation)
            difference = np.abs(to_pixels(image, config).astype(int) - pixels.astype(int))
            assert pixels.shape == difference.shape and difference.max() <= 1, file.name


def test_predictions_are_those_with_torch(
    model_file: Path, model_dir: Path, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = rocks / "marble" / "0003.jpg"
    paths = [single, rocks / "basalt", single]
    expected = predict(model_dir, paths, tmp_path / "torch", console=Console(file=io.StringIO()))
    found = onnx_predict.predict(model_file, paths, tmp_path / "onnx")
    assert [one.file for one in found] == [one.file for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert list(one.probabilities) == list(CLASSES) and sum(one.probabilities.values()) == pytest.approx(1)
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.03)
        assert one.predicted == max(one.probabilities, key=one.probabilities.__getitem__)
    same = [one.object_share == pytest.approx(other.object_share) for one, other in zip(found, expected, strict=True)]
    assert np.mean(same) > 0.9
    records, with_overlays = (json.loads((tmp_path / n / "predictions.json").read_text()) for n in ("onnx", "torch"))
    assert [record | {"overlay": None} for record in records] == [asdict(one) for one in found]
    assert with_overlays == [asdict(one) for one in expected]
    with open(tmp_path / "onnx" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = (tmp_path / "torch" / "predictions.csv").read_text().partition("\n")[0].split(",")
    assert columns == [*rows[0], "overlay"]
    assert [(row["file"], row["predicted"]) for row in rows] == [(one.file, one.predicted) for one in found]
    assert float(rows[0]["probability marble"]) == pytest.approx(found[0].probabilities["marble"], abs=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "class", "probability", "runner-up"] and lines[1].startswith(str(single))
    assert len(lines) == 1 + 25 + 1


def test_it_needs_few_packages() -> None:
    heavy = {"torch", "safetensors", "pydantic", "rich", "yaml"}
    program = f"import sys, fpcn_dist.deploy.onnx_predict; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_bad_files_are_listed_and_the_rest_is_classified(
    model_file: Path, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    good = shutil.copy(rocks / "marble" / "0000.jpg", folder / "good.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a photograph")
    (folder / "cut.jpg").write_bytes(Path(good).read_bytes()[:-400])
    Image.new("RGB", (200, 200)).save(folder / "huge.png")
    proto = onnx.load(model_file)
    next(entry for entry in proto.metadata_props if entry.key == "max_pixels").value = str(200 * 200 - 1)
    onnx.save(proto, tmp_path / "bounded.onnx")
    (one,) = onnx_predict.predict(tmp_path / "bounded.onnx", [folder], tmp_path / "out", max_decoded_mib=1)
    text = capsys.readouterr().out
    assert Path(one.file).name == "good.jpg"
    for name, reason in (
        ("empty.jpg", "the file is empty"),
        ("text.jpg", "not a JPEG"),
        ("cut.jpg", "truncated"),
        ("huge.png", "its header announces 200 x 200 = 40,000 pixels"),
    ):
        (line,) = [line for line in text.splitlines() if name in line]
        assert line.startswith("refused: ") and reason in line


def test_the_table_stays_short_and_counts_the_rest(model_file: Path, rocks: Path, tmp_path: Path, capsys):
    found = onnx_predict.predict(model_file, [rocks], tmp_path)
    text = capsys.readouterr().out
    assert len(found) == 72 and "40 of 72 files shown" in text and text.count(".jpg") == 40


def test_a_folder_is_searched_as_elsewhere(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a/c/3.tiff", ".hidden/4.jpg", "a/.5.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    paths = [tmp_path / "b/1.png", tmp_path]
    assert len(onnx_predict.find_files(paths)) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "images: none were given"),
        (["nowhere.jpg"], "nowhere.jpg: there is no such file or folder"),
        (["empty"], "empty: holds no images"),
        (["bad.jpg"], r"images: none of 1 file\(s\) can be read"),
    ],
)
def test_nothing_to_classify_is_an_error(model_file: Path, tmp_path: Path, names: list[str], message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_text("text")
    with pytest.raises(UserError, match=message):
        onnx_predict.predict(model_file, [tmp_path / name for name in names], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_an_error(model_file: Path, rocks: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"--output .*out: "):
        onnx_predict.predict(model_file, [rocks / "marble" / "0000.jpg"], tmp_path / "out")


def _foreign() -> onnx.ModelProto:
    """A model that is not ours."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "other", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def test_a_file_that_is_not_an_onnx_model_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match=r"model.onnx: there is no such file"):
        onnx_predict.open_model(path)
    for content in (b"", b"text" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model.onnx: is not an ONNX file that onnxruntime can load"):
            onnx_predict.open_model(path)
    onnx.save(_foreign(), path)
    with pytest.raises(UserError, match=r"model.onnx: was not written by fpcn_dist.*; export one with"):
        onnx_predict.open_model(path)
    with pytest.raises(UserError, match="is a folder"):
        onnx_predict.open_model(tmp_path)


def test_an_older_model_squeezes_its_images(model_file: Path, tmp_path: Path) -> None:
    model = onnx.load(model_file)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata.pop("fit") == "squeeze"
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, tmp_path / "model.onnx")
    assert onnx_predict.open_model(tmp_path / "model.onnx").fit == "squeeze"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "3", r"has format 3 \(fpcn_dist .*\), not 2; install fpcn_dist"),
        ("interpolation", "lanczos", "is damaged .*unknown interpolation lanczos"),
        ("classes", "[", "is damaged"),
        ("classes", '["basalt"]', "is damaged .*1 class names do not fit the output"),
        ("crop", "64", "is damaged .*do not fit the input"),
        ("crop", "wide", "is damaged"),
        ("mean", "[0.5]", "is damaged .*1 values for red, green and blue"),
        ("fit", "stretch", "is damaged .*unknown fit 'stretch'"),
        ("task", None, "is damaged .*KeyError 'task'"),
    ],
)
def test_damaged_metadata_are_refused(model_file: Path, tmp_path: Path, key: str, value, message: str):
    model = onnx.load(model_file)
    metadata = {entry.key: entry.value for entry in model.metadata_props} | {key: value}
    onnx.helper.set_model_props(model, {name: text for name, text in metadata.items() if text is not None})
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UserError, match=message):
        onnx_predict.open_model(tmp_path / "model.onnx")
