"""Classes and photographs of any names, from the folder to manifest, report, model card, predictions and ONNX."""

from __future__ import annotations

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

from fpcn_dist.data.index.manifest import Manifest, build_manifest
from fpcn_dist.deploy import onnx_predict
from fpcn_dist.deploy.onnx_graph import ExportableModel, to_onnx
from fpcn_dist.deploy.predict import predict
from fpcn_dist.models import build_model
from fpcn_dist.recipe.reading import dump_recipe
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.finish import evaluate_run
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.model_folder import load_model, save_model
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
    (root / CLASSES[0] / os.fsdecode(b"bad \xe9 [/].jpg")).write_text("no image")
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run in a folder of such a name, with a model that never learnt."""
    recipe = Recipe(
        name="[/] :smile: \n <b>",
        model=ModelConfig(backbone="test_resnet", pretrained=False, hidden=16),
        data=DataConfig(resize=40, crop=32, classes_per_batch=None, images_per_class=1, threads=1, val_fraction=0.25),
    )
    run = RunFolder(tmp_path_factory.mktemp("runs") / os.fsdecode(b"caf\xe9 [/] run"))
    run.path.mkdir()
    manifest = build_manifest(folder, recipe.data, seed=0)
    manifest.save(run.manifest)
    run.recipe.write_text(dump_recipe(recipe))
    torch.manual_seed(0)
    model = build_model(recipe.model, len(CLASSES), task="contrast")
    save_model(run.path, model, recipe, manifest.classes)
    proto, _ = to_onnx(ExportableModel(model), load_model(run.path)[1])
    onnx.save(proto, run.path / "model.onnx")
    return run


@pytest.fixture(params=["utf-8", "ascii"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """What was printed to a stream that refuses what its encoding lacks."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=request.param, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "2000")

    def text() -> str:
        stream.flush()
        return stream.buffer.getvalue().decode(request.param)  # type: ignore[attr-defined]

    with quiet_without_reader():
        yield text


def test_a_manifest_that_was_read_again_leads_to_the_same_files(run: RunFolder, folder: Path) -> None:
    manifest = Manifest.load(run.manifest)
    assert manifest.classes == CLASSES and len(manifest.images) == 4 * len(CLASSES)
    found = {os.fsencode(path) for path in folder.rglob("*.jpg")}
    blobs = [manifest.blob(index) for index in range(len(manifest.images))]
    assert len({os.fsencode(blob.path) for blob in blobs} & found) == len(blobs) and all(blob.read() for blob in blobs)
    assert [os.fsencode(path) for path, _ in manifest.refused] == [os.fsencode(CLASSES[0]) + b"/bad \xe9 [/].jpg"]


def test_evaluation_report_and_card(run: RunFolder, shown: Callable[[], str]) -> None:
    evaluate_run(run, ALONE)
    text = shown()
    rows = [printable(name).encode(sys.stdout.encoding, ESCAPE).decode(sys.stdout.encoding) for name in CLASSES]
    assert all(row in text for row in rows) and "\x1b" not in text and "\x07" not in text

    evaluation = Evaluation.load(run.path)
    assert evaluation is not None and evaluation.classes == CLASSES
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "caf\\xe9" in page and "\x1b" not in page and "<script>alert" not in page and "[unknown]" in page
    _, front, body = (run.path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["model-index"][0]["name"] == "[/] :smile: \\n <b>"
    table = [line for line in body.splitlines() if line.endswith(" 1 |") and line.startswith("| ")]
    assert len(table) == len(CLASSES) and "\x1b" not in body and "<script" not in body.replace("\\<", "")


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_predictions(run: RunFolder, folder: Path, tmp_path: Path, kind: str, shown: Callable[[], str]) -> None:
    if kind == "torch":
        found = predict(run.path, [folder], tmp_path)
        overlays = [one.overlay or "" for one in found]
        assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == sorted(overlays)
        assert len({name.lower() for name in overlays}) == len(found) and max(map(len, overlays)) < 130
    else:
        found = onnx_predict.predict(run.path / "model.onnx", [folder], tmp_path)
    assert len(found) == 4 * len(CLASSES) and "bad \\xe9 [/].jpg" in shown() and "\x1b" not in shown()
    records = json.loads((tmp_path / "predictions.json").read_text())
    assert all(Path(record["file"]).is_file() and list(record["probabilities"]) == list(CLASSES) for record in records)
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    written = [one.file.encode("utf-8", ESCAPE).decode() for one in found]
    assert [row["file"] for row in rows] == written
    assert f"probability {CLASSES[0]}".encode("utf-8", ESCAPE).decode() in rows[0]
