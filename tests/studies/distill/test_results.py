"""The results of a distillation, read from run folders of real models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fpcn_dist.models import build_model
from fpcn_dist.models.cost import measure
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.model_folder import save_model
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.distill.distillation import write_results
from fpcn_dist.training.soft_labels.teacher import weights_sha256

CPU = torch.device("cpu")
STUDENTS = ("test_resnet", "test_efficientnet")


def _save(folder: Path, backbone: str, task: str, accuracy: float, images: int = 200) -> None:
    folder.mkdir(parents=True)
    model = ModelConfig(backbone=backbone, pretrained=False, hidden=8)
    recipe = Recipe(task=task, model=model, data=DataConfig(resize=40, crop=32, views=4))
    save_model(folder, build_model(model, 3, task=task), recipe, ["a", "b", "c"])
    _score(folder, accuracy, images)


def _score(folder: Path, accuracy: float, images: int = 200) -> None:
    Evaluation("test", "best.safetensors", 7, images, 0.5, accuracy, (), ((images,),), ()).save(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distillation")
    _save(root / "teacher", "resnet10t", "contrast", 0.95)
    for name, baseline, distilled in zip(STUDENTS, (0.80, 0.85), (0.90, 0.84), strict=True):
        _save(root / "out" / name, name, "distill", distilled)
        _save(root / "out" / f"{name}-baseline", name, "classify", baseline)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def _write(root: Path, reasons: dict[str, str], *, baselines: bool = True) -> dict:
    write_results(root / "out", STUDENTS, root / "teacher", reasons, CPU, baselines=baselines)
    assert (root / "out" / "report.html").read_text().startswith("<!doctype html>")
    return json.loads((root / "out" / "distillation.json").read_text())


def _table(printed: str) -> list[list[str]]:
    """Cells of the rows that the console shows."""
    return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in printed.splitlines() if "│" in line]


def test_every_number_is_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _write(root, {})
    assert found["teacher"]["folder"] == str(root / "teacher") and found["teacher"]["backbone"] == "resnet10t"
    assert found["teacher"]["sha256"] == weights_sha256(root / "teacher")
    assert found["teacher"]["evaluation"] == {"accuracy": 0.95, "split": "test", "images": 200}
    assert found["image_size"] == 32 and "CPU" in found["device"]
    assert [row["student"] for row in found["students"]] == list(STUDENTS)
    for row in found["students"]:
        model = build_model(ModelConfig(backbone=row["student"], pretrained=False), 3, task="distill")
        cost = measure(model, 32, CPU)
        assert (row["parameters"], row["flops"]) == (cost.parameters, cost.flops)
        assert row["milliseconds"] > 0 and row["reasons"] == {}
    first, second = found["students"]
    assert first["distilled"]["accuracy"] == 0.9 and first["baseline"]["accuracy"] == 0.8
    assert first["gain_points"] == pytest.approx(10) and second["gain_points"] == pytest.approx(-1)

    printed = capsys.readouterr().out
    teacher, one, two = _table(printed)
    assert teacher[0] == "teacher (resnet10t)" and teacher[4:] == ["95.0", "", ""]
    assert one[0] == "test_resnet" and one[4:] == ["80.0", "90.0", "+10.0"]
    assert two[0] == "test_efficientnet" and two[4:] == ["85.0", "84.0", "-1.0"]
    assert float(one[1]) == pytest.approx(first["parameters"] / 1e6, rel=0.01)
    assert float(one[2]) == pytest.approx(first["flops"] / 1e9, rel=0.01)
    assert float(one[3]) == pytest.approx(first["milliseconds"], rel=0.01)
    assert "two for each multiply-add" in printed and "paper's Table 4 lists multiply-adds" in printed
    assert "on 200 test images" in printed and "does not compare" not in printed
    assert f"report {root / 'out' / 'report.html'}" in printed


def test_without_baselines_there_is_one_accuracy(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _write(root, {}, baselines=False)
    assert [(row["baseline"], row["gain_points"]) for row in found["students"]] == [(None, None)] * 2
    assert [row[4:] for row in _table(capsys.readouterr().out)] == [["95.0"], ["90.0"], ["84.0"]]


def test_what_has_no_result_keeps_its_row_and_says_why(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies in the folder of a run that failed is from an earlier try."""
    shutil.rmtree(root / "out" / "test_resnet")
    reasons = {"test_resnet": "[b]the loss is nan[/b]", "test_efficientnet-baseline": "given up"}
    found = _write(root, reasons)
    first, second = found["students"]
    assert first["distilled"] is None and first["gain_points"] is None
    assert first["baseline"]["accuracy"] == 0.8 and first["parameters"] > 1e5  # measured on the baseline
    assert second["baseline"] is None and second["distilled"]["accuracy"] == 0.84
    assert first["reasons"] == {"test_resnet": reasons["test_resnet"]}
    assert second["reasons"] == {"test_efficientnet-baseline": "given up"}
    printed = capsys.readouterr().out
    assert [row[4:] for row in _table(printed)[1:]] == [["80.0", "-", "-"], ["-", "84.0", "-"]]
    assert "test_resnet has no result: [b]the loss is nan[/b]" in printed
    assert "[b]the loss is nan[/b]" in (root / "out" / "report.html").read_text()


def test_a_damaged_folder_does_not_hide_the_others(root: Path) -> None:
    for folder in (root / "out").glob("test_resnet*"):
        (folder / "model.safetensors").write_bytes(b"cut")
    (root / "out" / "test_efficientnet" / "evaluation.json").unlink()
    first, second = _write(root, {})["students"]
    assert "is not a safetensors file" in first["reasons"]["test_resnet"]
    assert first["flops"] is None and first["milliseconds"] is None
    assert second["reasons"] == {"test_efficientnet": "it was not evaluated"}
    assert second["baseline"]["accuracy"] == 0.85


@pytest.mark.parametrize("images", [None, 37])
def test_a_teacher_that_was_scored_elsewhere_or_never(
    images: int | None, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if images is None:
        (root / "teacher" / "evaluation.json").unlink()
    else:
        _score(root / "teacher", 0.95, images)
    found = _write(root, {}, baselines=False)
    printed = capsys.readouterr().out
    assert _table(printed)[0][4] == ("-" if images is None else "95.0")
    assert (found["teacher"]["evaluation"] is None) == (images is None)
    assert ("The teacher's is on 37 test images and does not compare" in printed) == (images == 37)


def test_no_teacher_is_an_error(root: Path) -> None:
    (root / "teacher" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        _write(root, {})
