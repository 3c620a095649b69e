"""From a finished run to predictions on a machine that has neither torch nor most of what the library needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.helpers.launching import ROOT, command

EXPORT, PREDICT = str(ROOT / "launch/export.py"), str(ROOT / "launch/predict.py")
LAPTOP = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Missing())
"""
ABSENT = ("torch", "torchvision", "triton", "tyro", "pydantic", "rich", "yaml", "safetensors", "onnx", "nvidia")


def _laptop(folder: Path, argv: list[str], absent: tuple[str, ...] = ABSENT) -> subprocess.CompletedProcess[str]:
    """Run Python where the packages ``absent`` cannot be imported."""
    (folder / "sitecustomize.py").write_text(LAPTOP.format(names=absent))
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def models(runs, single, tmp_path_factory) -> tuple[Path, str]:
    """The folder with both exported models, and what the command printed."""
    folder = tmp_path_factory.mktemp("models")
    done = runs.run([*command("python"), EXPORT, str(single), "--format", "onnx", "--int8", "--output", str(folder)])
    return folder, done.stdout


@pytest.mark.parametrize("name", ["model.onnx", "model-int8.onnx"])
def test_predict_without_torch(runs, single, models, tmp_path, name):
    folder, text = models
    assert "Parity on " in text and f"Wrote {folder / name}" in text
    photograph = runs.data / "marble" / "0001.jpg"
    (tmp_path / "broken.jpg").write_text("no image")
    images = [str(photograph), str(runs.data / "basalt"), str(tmp_path / "broken.jpg")]
    done = _laptop(tmp_path, [PREDICT, "--output", str(tmp_path / "out"), str(folder / name), *images])
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "refused: " in done.stdout and str(photograph) in done.stdout
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(found) == 25 and len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 26
    assert all(one["predicted"] in ("basalt", "dolomite", "marble") for one in found)


def test_the_laptop_of_this_test_has_no_torch(tmp_path):
    for name in ABSENT:
        done = _laptop(tmp_path, ["-c", f"import {name}"])
        assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr


def test_what_the_laptop_lacks_is_named(models, tmp_path):
    done = _laptop(tmp_path, [PREDICT, str(models[0] / "model.onnx"), "x.jpg"], (*ABSENT, "onnxruntime"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: package onnxruntime: is not installed; pip install onnxruntime numpy pillow")


def test_bad_input_to_predict_is_one_line(models, runs, tmp_path):
    ours, photograph = str(models[0] / "model.onnx"), str(runs.data / "marble" / "0001.jpg")
    (tmp_path / "broken.jpg").write_text("no image")
    (tmp_path / "text.onnx").write_text("no model")
    model = onnx.load(ours)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    for argv, message in (
        ([str(tmp_path / "none.onnx"), photograph], "there is no such file"),
        ([str(tmp_path / "text.onnx"), photograph], "is not an ONNX file"),
        ([str(tmp_path / "foreign.onnx"), photograph], "was not written by fpcn_dist"),
        ([ours, str(tmp_path / "none.jpg")], "there is no such file or folder"),
        ([ours, str(tmp_path / "broken.jpg")], "none of 1 file(s) can be read"),
    ):
        done = _laptop(tmp_path, [PREDICT, *argv, "--output", str(tmp_path / "out")])
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_the_export_lacks_is_named(tmp_path, name):
    done = _laptop(tmp_path, [EXPORT, str(tmp_path)], (name,))
    assert done.returncode == 2
    assert done.stderr == f"error: --format onnx: package {name} is not installed; pip install -e '.[export]'\n"


def test_bad_input_to_export_is_one_line(runs, single, tmp_path):
    for argv, message in (
        ([str(tmp_path / "nowhere")], "there is no such folder"),
        ([str(tmp_path), "--int8"], "holds no config.json"),
        ([str(single), "--format", "safetensors", "--int8"], "only ONNX models are quantised"),
    ):
        done = runs.run([*command("python"), EXPORT, *argv], expect=2)
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_safetensors(runs, single, tmp_path):
    argv = [*command("python"), EXPORT, str(single), "--format", "safetensors", "--output", str(tmp_path / "model")]
    assert "model.safetensors" in runs.run(argv).stdout
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
