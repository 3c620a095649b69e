"""Classes and photographs of any names, from the folder to manifest, report, model card, predictions and ONNX."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
import yaml

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.deploy import onnx_predict
from fpcn_dist.deploy.onnx_graph import ExportableModel, to_onnx
from fpcn_dist.deploy.predict import predict
from fpcn_dist.deploy.predictions import Prediction
from fpcn_dist.models import build_model
from fpcn_dist.recipe.reading import dump_recipe
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.finish import evaluate_run
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.model_folder import load_model, save_model
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import ESCAPE, printable
from fpcn_dist.runtime.output import quiet_without_reader
from tests.helpers.distilling import ALONE
from tests.helpers.names import NAMES

CLASSES = tuple(sorted(name for name in NAMES if name != "e\u0301"))
"""A composed and a decomposed form of one name are one class."""


@pytest.fixture(scope="module")
def folder(rocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which each class has four photographs, one of them with a name like that of a class."""
    root, photographs = tmp_path_factory.mktemp("data"), sorted(rocks.rglob("*.jpg"))
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for place, file in enumerate(photographs[4 * number : 4 * number + 4]):
            shutil.copy(file, root / name / (f"{NAMES[number]}.jpg" if place == 0 else f"{place}.jpg"))
    (root / CLASSES[0] / os.fsdecode(b"bad \xe9 [b].jpg")).write_text("no image")
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run in a folder of such a name, with a model that never learnt."""
    recipe = Recipe(
        name="[/] :smile: \n <b>",
        model=ModelConfig(backbone="test_resnet", pretrained=False, hidden=16),
        data=DataConfig(resize=40, crop=32, classes_per_batch=None, images_per_class=1, threads=1, val_fraction=0.25),
    )
    run = RunFolder(tmp_path_factory.mktemp("runs") / "[b] :smile: \n run")
    run.path.mkdir()
    manifest = build_manifest(folder, recipe.data, seed=0)
    manifest.save(run.manifest)
    run.recipe.write_text(dump_recipe(recipe))
    torch.manual_seed(0)
    save_model(run.path, build_model(recipe.model, len(CLASSES), task="contrast"), recipe, manifest.classes)
    return run


@pytest.fixture(scope="module")
def model_file(run: RunFolder) -> Path:
    """The run's model in ONNX."""
    model, info = load_model(run.path)
    onnx.save(to_onnx(ExportableModel(model), info)[0], run.path / "model.onnx")
    return run.path / "model.onnx"


@contextlib.contextmanager
def printing(encoding: str) -> Iterator[Callable[[], str]]:
    """Print to a stream that refuses what its encoding lacks; gives what was printed."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")

    def text() -> str:
        stream.flush()
        return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setenv("COLUMNS", "2000")
        with quiet_without_reader():
            yield text


encodings = pytest.mark.parametrize("encoding", ["utf-8", "ascii"])


def test_a_manifest_that_was_read_again_leads_to_the_same_files(run: RunFolder, folder: Path) -> None:
    manifest = Manifest.load(run.manifest)
    assert manifest.classes == CLASSES and len(manifest.images) == 4 * len(CLASSES)
    found = {os.fsencode(path) for path in folder.rglob("*.jpg")}
    blobs = [manifest.blob(index) for index in range(len(manifest.images))]
    assert len({os.fsencode(blob.path) for blob in blobs} & found) == len(blobs) and all(blob.read() for blob in blobs)
    assert [os.fsencode(path) for path, _ in manifest.refused] == [os.fsencode(CLASSES[0]) + b"/bad \xe9 [b].jpg"]


@encodings
def test_evaluation_report_and_card(run: RunFolder, encoding: str) -> None:
    with printing(encoding) as shown:
        evaluate_run(run, ALONE)
        text = shown()
    rows = [printable(name).encode(encoding, ESCAPE).decode(encoding) for name in CLASSES]
    assert all(row in text for row in rows) and "\x1b" not in text and "\x07" not in text

    evaluation = Evaluation.load(run.path)
    assert evaluation is not None and evaluation.classes == CLASSES
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "caf\\xe9" in page and "\x1b" not in page and "<script>alert" not in page and "[unknown]" in page
    _, front, body = (run.path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["model-index"][0]["name"] == "[/] :smile: \\n <b>"
    table = [line for line in body.splitlines() if line.endswith(" 1 |") and line.startswith("| ")]
    assert len(table) == len(CLASSES) and "\x1b" not in body and "<script" not in body.replace("\\<", "")


def _require_files(found: list[Prediction], text: str, output: Path) -> None:
    assert len(found) == 4 * len(CLASSES) and "bad \\xe9 [b].jpg" in text and "\x1b" not in text
    records = json.loads((output / "predictions.json").read_text())
    assert all(Path(record["file"]).is_file() and list(record["probabilities"]) == list(CLASSES) for record in records)
    with open(output / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [one.file.encode("utf-8", ESCAPE).decode() for one in found]
    assert f"probability {CLASSES[0]}".encode("utf-8", ESCAPE).decode() in rows[0]


@encodings
def test_predictions(run: RunFolder, folder: Path, tmp_path: Path, encoding: str) -> None:
    with printing(encoding) as shown:
        found = predict(run.path, [folder], tmp_path)
        text = shown()
    _require_files(found, text, tmp_path)
    overlays = [one.overlay or "" for one in found]
    assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == sorted(overlays)
    assert len({name.lower() for name in overlays}) == len(found) and max(map(len, overlays)) < 130


@pytest.mark.slow
@encodings
def test_predictions_without_torch(model_file: Path, folder: Path, tmp_path: Path, encoding: str) -> None:
    moved = shutil.copy(model_file, tmp_path / os.fsdecode(b"caf\xe9.onnx"))
    with printing(encoding) as shown:
        found = onnx_predict.predict(Path(moved), [folder], tmp_path)
        text = shown()
    _require_files(found, text, tmp_path)


def test_a_run_folder_whose_weights_could_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output .*caf\\xe9: the path is not UTF-8"):
        RunFolder(tmp_path / os.fsdecode(b"caf\xe9")).create()
    assert not list(tmp_path.iterdir())
