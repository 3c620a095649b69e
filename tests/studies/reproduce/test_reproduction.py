"""The command from beginning to end, killed once in between."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.lock import locked
from fpcn_dist.studies.cluster import Slots
from fpcn_dist.studies.reproduce import reproduction
from fpcn_dist.studies.reproduce.estimate import in_words
from tests.helpers.distilling import recipe
from tests.helpers.launching import ROOT, Runs, environment, finish, start
from tests.helpers.ray_cluster import wait_for

pytestmark = pytest.mark.slow

RECIPES = ROOT / "launch/recipes/compared"
_DATA = ("--data.resize", "40", "--data.crop", "32", "--data.images-per-class", "4")
_MODEL = ("--model.norm", "frozen_batch", "--model.backbone", "test_resnet")
SMALL = (*_DATA, *_MODEL, "--train.epochs", "1", "--train.eval-every", "1")


def command(data: Path, output: Path, *more: str) -> list[str]:
    folders = ["--data", str(data), "--output", str(output)]
    return [sys.executable, str(ROOT / "launch/reproduce.py"), *folders, *SMALL, *more]


@pytest.fixture(scope="module")
def done(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """Output folder, what the second start printed, and when the first finished model was written."""
    folder = tmp_path_factory.mktemp("reproduce")
    argv = command(
        runs.data, folder / "out", "--only", "table4,figure4,figure5", "--students", "shufflenet_v2_x0_5", "--yes"
    )
    process = start(argv, folder)
    finished = folder / "out/runs"
    wait_for(lambda: list(finished.glob("*/outcome.json")), process)
    process.kill()
    process.communicate()
    (first, *_) = [path.parent for path in finished.glob("*/outcome.json")]
    written = (first / "model.safetensors").stat().st_mtime_ns
    shown = finish(start(argv, folder))
    assert (first / "model.safetensors").stat().st_mtime_ns == written, "what is finished is not trained again"
    return folder / "out", shown, written


def test_everything_is_trained_and_reported(done):
    output, shown, _ = done
    runs = {path.name for path in (output / "runs").iterdir() if (path / "outcome.json").is_file()}
    assert runs == {"fpcn-seed0", "mask_center-seed0", "baseline-seed0"}
    assert re.search(r"[12] finished before; about", shown)
    assert not list((output / "runs").glob("*/checkpoints")), "whose models are kept"
    page = (output / "report.html").read_text()
    for text in ("Figure 4", "Figure 5", "Table 4", "data:image/jpeg;base64", "shufflenet_v2_x0_5"):
        assert text in page


def test_numbers_are_those_of_the_runs(done):
    output, _, _ = done
    values = json.loads((output / "results.json").read_text())
    table4, figure4 = values["tables"]
    fpcn = Evaluation.load(output / "runs/fpcn-seed0")
    assert fpcn is not None and values["images"] == fpcn.images and values["split"] == fpcn.split
    teacher, student = table4["rows"]
    assert teacher["scores"][0] == {"paper": 93.1, "ours": [100 * fpcn.accuracy]}
    assert teacher["details"][1] == 46.06 and teacher["details"][3] == pytest.approx(56.42)
    distilled = Evaluation.load(output / "students-seed0/shufflenet_v2_x0_5")
    assert distilled is not None and student["scores"][1]["ours"] == [100 * distilled.accuracy]
    quartiles = [row for row in figure4["rows"] if row["name"] == "with alpha"]
    assert [row["details"][1] for row in quartiles] == [part.images for part in fpcn.area_quartiles]
    for row, part in zip(quartiles, fpcn.area_quartiles, strict=True):
        assert row["scores"][0]["ours"] == ([] if part.accuracy is None else [100 * part.accuracy])
    for row in csv.DictReader((output / "results.csv").read_text().splitlines()):
        assert "launch/train.py --recipe" in row["commands"] and row["commits"]


def test_the_command_of_a_row_repeats_it(done, tmp_path):
    output, _, _ = done
    values = json.loads((output / "results.json").read_text())
    (record,) = [r for r in values["tables"][0]["rows"][0]["runs"] if r["folder"] == "runs/fpcn-seed0"]
    again = tmp_path / "again"
    argv = record["command"].replace("NEW", str(again)).split()
    subprocess.run([sys.executable, *argv[1:]], cwd=ROOT, env=environment(), check=True, capture_output=True)
    first, second = (Evaluation.load(folder) for folder in (output / "runs/fpcn-seed0", again))
    assert first is not None and second is not None and first.confusion == second.confusion


def test_another_recipe_is_not_mixed_in(done, runs):
    output, _, _ = done
    other = command(runs.data, output, "--only", "figure4", "--optim.lr", "0.5", "--yes")
    message = runs.run(other, expect=2).stderr
    assert "holds a reproduction with another optim.lr (0.001, now 0.5)" in message and message.count("\n") == 1


def test_nobody_to_ask(runs, tmp_path):
    message = runs.run(command(runs.data, tmp_path / "out", "--only", "figure5"), expect=2).stderr
    assert "--yes: nobody is there to be asked whether to begin; give --yes" in message
    assert not (tmp_path / "out").exists()


def test_it_asks_first(runs, tmp_path):
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        command(runs.data, tmp_path / "out", "--only", "figure5"),
        stdin=end,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    os.write(terminal, b"n\n")
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "Begin? [y/N]" in shown and "nothing was started" in shown
    assert not list((tmp_path / "out/runs").glob("*/recipe.yaml"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--only", "table9"), "--only table9: is none of the paper's tables and figures"),
        (("--seeds", "0"), "--seeds 0: leaves nothing to train"),
        (("--scale", "huge"), "huge"),
        (("--seed", "-1"), "command line: seed -1: input should be greater than or equal to 0"),
        (("--address", "127.0.0.1:1"), "--address 127.0.0.1:1: no Ray cluster can be joined there"),
        (("--only", "table4", "--students", "resnet19"), "resnet19: there is no such network"),
    ],
)
def test_bad_input(runs, tmp_path, more, message):
    failed = runs.run(command(runs.data, tmp_path / "out", *more, "--yes"), expect=2)
    assert message in failed.stderr + failed.stdout and "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()


def test_a_strangers_folder_is_left_alone(runs, tmp_path):
    (tmp_path / "thesis.tex").touch()
    message = runs.run(command(runs.data, tmp_path, "--only", "figure5", "--yes"), expect=2).stderr
    assert "holds other files (thesis.tex)" in message


def test_nothing_is_written_to_a_folder_that_another_owns(rocks, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "connect_ray", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(reproduction, "find_slots", lambda *_, **__: Slots("CPU", 1, 1))
    request = reproduction.ReproductionRequest(recipe("contrast"), RECIPES, "tiny", ("figure5",), seeds=1, students=())
    output = tmp_path / "out"
    output.mkdir()
    with locked(output), pytest.raises(UserError, match="another run is writing to it"):
        reproduction.reproduce(request, rocks, output, yes=True)
    assert not list(output.iterdir())


def test_durations_in_words():
    shown = ["12 s", "99 s", "2 min", "83 min", "2.0 h", "4.6 days"]
    assert [in_words(s) for s in (12.4, 99.4, 150, 5000, 7300, 400000)] == shown
