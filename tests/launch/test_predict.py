"""The commands around a finished run: evaluate, predict, synthesize, benchmark."""

from __future__ import annotations

import json

import pytest

from tests.helpers.launching import ROOT, command


def test_evaluate_again_on_another_split_and_on_two_ranks(runs, single):
    before = json.loads((single / "evaluation.json").read_text())
    runs.run([*command("python"), str(ROOT / "launch/evaluate.py"), str(single), "--split", "train"])
    train = json.loads((single / "evaluation.json").read_text())
    assert train["split"] == "train" and train["images"] > before["images"]
    runs.run([*command("torchrun"), str(ROOT / "launch/evaluate.py"), str(single)])
    after = json.loads((single / "evaluation.json").read_text())
    assert after.pop("loss") == pytest.approx(before.pop("loss"))
    assert after == before
    done = runs.run([*command("python"), str(ROOT / "launch/evaluate.py"), str(single), "--split", "teste"], expect=2)
    assert "teste" in done.stdout + done.stderr


def test_predict_a_folder_and_a_file(runs, single, tmp_path):
    first = sorted((runs.data / "marble").glob("*.jpg"))[0]
    (tmp_path / "broken.jpg").write_text("no image")
    predict = [*command("python"), str(ROOT / "launch/predict.py"), str(single)]
    output = tmp_path / "predictions"
    images = [runs.data / "basalt", first, tmp_path / "broken.jpg"]
    done = runs.run([*predict, *map(str, images), "--output", str(output)])
    assert "broken.jpg" in done.stdout
    found = json.loads((output / "predictions.json").read_text())
    assert "broken.jpg" not in json.dumps(found) and str(first) in json.dumps(found)
    assert len(list((output / "overlays").glob("*.png"))) == 25
    done = runs.run([*predict, str(tmp_path / "broken.jpg"), "--output", str(output)], expect=2)
    assert "none of 1 file(s) can be read" in done.stderr and "Traceback" not in done.stderr


def test_synthesize(runs, tmp_path):
    script = str(ROOT / "launch/synthesize.py")
    argv = [*command("python"), script, "--output", str(tmp_path), "--images-per-class", "2"]
    assert "6 images" in runs.run(argv).stdout
    assert len(list(tmp_path.glob("*/*.jpg"))) == 6
    (tmp_path / "file").write_text("")
    for bad in (["--output", str(tmp_path / "file")], ["--output", str(tmp_path), "--images-per-class", "-3"]):
        done = runs.run([*command("python"), script, *bad], expect=2)
        assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
