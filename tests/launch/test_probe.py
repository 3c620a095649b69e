"""The probe's command: its own recipe, another one, and what it refuses."""

from __future__ import annotations

import json

from tests.helpers.launching import ROOT, command

PROBE = [*command("python"), str(ROOT / "launch/probe.py")]


def test_the_command_takes_its_own_recipe_unless_another_is_given(runs, tmp_path):
    sizes = ["--data.resize", "40", "--data.crop", "32"]
    network = ["--model.backbone", "test_resnet", "--model.pretrained", "false"]
    done = runs.run([*PROBE, "--data", str(runs.data), *sizes, *network, "--output", str(tmp_path)])
    assert "frozen test_resnet at 32 px, 6 test images, fitted to 60" in done.stdout  # a tenth of each class
    assert f"Wrote {tmp_path}/probe.json" in done.stdout
    assert json.loads((tmp_path / "probe.json").read_text())["pixels"]["crop"] == 32
    done = runs.run([*PROBE, "--data", str(runs.data), "--recipe", str(runs.recipe)])
    assert "frozen test_resnet at 32 px, 15 test images, fitted to 42" in done.stdout


def test_bad_input_is_one_line(runs, tmp_path):
    for words in (["--model.pretrained", str(tmp_path / "none.pth")], ["--folds", "-2"], ["--recipe", "none.yaml"]):
        done = runs.run([*PROBE, "--data", str(runs.data), *words], expect=2)
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {words[0].removeprefix('--') if 'model' in words[0] else words[0]} {words[1]}")
