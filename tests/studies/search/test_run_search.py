"""The real command on real Ray: every stage, every scheduler, and what goes wrong on the way."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fpcn_dist.recipe.reading import load_recipe
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.studies.search.records import SearchResults, TrialRecord, load_results
from tests.helpers.distilling import make_teacher
from tests.helpers.launching import ROOT, TINY, Runs, command, environment, finish, losses, run_command, start
from tests.helpers.ray_cluster import ENVIRONMENT as CLUSTER
from tests.helpers.ray_cluster import Order, node_of, ray_cluster, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VALUES: dict[str, Any] = yaml.safe_load(TINY)
STUDENT = VALUES | {"task": "distill", "name": "student", "data": VALUES["data"] | {"views": 2}}


class Command:
    """tune/search.py on tiny photographs."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def recipe(self, name: str, values: dict[str, Any], **sections: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | sections))
        return path

    def argv(self, output: str, recipe: Path, stage: str, *options: str) -> list[str]:
        given = {"recipe": recipe, "data": self.data, "stage": stage, "output": self.folder / output}
        named = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [sys.executable, str(ROOT / "tune/search.py"), *named, *options]

    def start(self, *args: Any, **env: str) -> subprocess.Popen[str]:
        return start(self.argv(*args), self.folder, **env)

    def results(self, output: str) -> SearchResults:
        found = load_results(self.folder / output)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def search(tmp_path_factory, rocks) -> Command:
    return Command(tmp_path_factory.mktemp("search"), rocks)


@pytest.fixture(scope="module")
def teacher(search) -> tuple[Path, str]:
    """A search of the teacher stage, and what it printed."""
    recipe = search.recipe("tiny", VALUES)
    return search.folder / "teacher", finish(search.start("teacher", recipe, "teacher", "--trials", "4"))


def log_of(output: Path, trial: TrialRecord, rank: int = 0) -> Path:
    return output / "logs" / f"trial-{trial.number:05d}-rank{rank}.log"


def test_one_command_leaves_everything(teacher, search):
    output, shown = teacher
    results = search.results("teacher")
    assert [trial.number for trial in results.trials] == [0, 1, 2, 3]
    assert {trial.state for trial in results.trials} <= {"finished", "stopped"} and results.finished
    for trial in results.trials:
        whole = trial.state == "finished"
        run = output / "trials" / f"{trial.number:05d}"
        assert trial.epoch == 4 if whole else trial.epoch < 4
        evaluated = [line["accuracy"] for line in read_metrics(run) if line["kind"] == "eval"]
        assert trial.accuracy == max(evaluated[: int(trial.epoch)])
        assert (run / "model.safetensors").is_file() == whole
        assert not (run / "checkpoints").exists()
        recipe = load_recipe(run / "recipe.yaml")
        assert recipe.contrast.center_weight == trial.settings["contrast.center_weight"]
        assert recipe.contrast.pairs == trial.settings["contrast.pairs"]
        assert trial.pairs == (recipe.contrast.num_pairs or 144)
    assert (output / "report.html").is_file()
    rows = list(csv.DictReader((output / "results.csv").read_text().splitlines()))
    assert [row["accuracy"] for row in rows] == [str(trial.accuracy) for trial in results.trials]
    assert re.search(r"\d+ s in trials of \d+ s x \d+: \d+ %", shown)
    assert results.best is not None and f"{100 * results.best.accuracy:.1f} %" in shown
    assert not list(Path("/tmp").glob("fpcn-*/ray_current_cluster"))


def test_train_reproduces_the_best_trial(teacher, search, rocks):
    output, _ = teacher
    best = search.results("teacher").best
    assert best is not None
    run = search.folder / "again"
    Runs(search.folder, rocks).run(
        [
            *command("python"),
            str(ROOT / "launch/train.py"),
            "--recipe",
            str(output / "best.yaml"),
            "--data",
            str(rocks),
            "--output",
            str(run),
        ]
    )
    assert losses(run) == losses(output / "trials" / f"{best.number:05d}")
    assert max(line["accuracy"] for line in read_metrics(run) if line["kind"] == "eval") == best.accuracy


def test_a_search_is_not_overwritten_nor_resumed_as_another(teacher, search):
    recipe = search.recipe("tiny", VALUES)
    other = search.recipe("other", VALUES, optim={"lr": 0.01})
    for argv, message in [
        (search.argv("teacher", recipe, "teacher", "--trials", "4"), "holds a search already; add --resume"),
        (search.argv("teacher", other, "teacher", "--trials", "4", "--resume"), "the search in .* has another recipe"),
        (search.argv("nowhere", recipe, "teacher", "--resume"), "nowhere: holds no search; drop --resume"),
    ]:
        done = run_command(argv, search.folder)
        assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


def test_a_finished_search_takes_more_trials_from_elsewhere_and_signals_cost_nothing(teacher, search, rocks, tmp_path):
    """Its folder and its data have moved; Ctrl-C, then SIGTERM twice; nothing of Tune's own state is read."""
    folder, data = tmp_path / "moved {0} ü", tmp_path / "elsewhere"
    shutil.copytree(teacher[0], folder)
    shutil.copytree(rocks, data)
    (folder / "tune").mkdir(exist_ok=True)
    trap = tmp_path / "sprung"
    (folder / "tune" / "tuner.pkl").write_bytes(f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode())
    moved = Command(tmp_path, data)
    options = (folder.name, moved.recipe("tiny", VALUES), "teacher", "--trials", "8", "--resume")
    first = {n: (folder / f"trials/{n:05d}/metrics.jsonl").read_bytes() for n in range(4)}
    for signals, status, words in (
        ([signal.SIGINT], 130, "interrupted"),
        ([signal.SIGTERM] * 2, 75, "stopped by SIGTERM with the checkpoints of its runs on the disk; the same command"),
    ):
        process = moved.start(*options)
        known = len(moved.results(folder.name).trials)
        wait_for(lambda n=known: len(moved.results(folder.name).trials) > min(n, 7), process)
        for number in signals:
            process.send_signal(number)
        shown, _ = process.communicate(timeout=120)
        assert process.returncode == status, shown
        assert shown.splitlines()[-1].startswith(words) and "Traceback" not in shown, shown
        assert not list(Path("/tmp").glob(f"fpcn-*/session_*_{process.pid}"))
    finish(moved.start(*options))
    results = moved.results(folder.name)
    assert [trial.number for trial in results.trials] == list(range(8))
    assert {trial.state for trial in results.trials} <= {"finished", "stopped"}
    assert {n: (folder / f"trials/{n:05d}/metrics.jsonl").read_bytes() for n in range(4)} == first
    shown = finish(moved.start(*options))
    assert "0 s in trials" in shown and not trap.exists()


def test_students_learn_from_one_bank_and_latency_makes_a_pareto_front(search):
    taught = make_teacher(search.folder / "taught")
    recipe = search.recipe("student", STUDENT, train=STUDENT["train"] | {"epochs": 1})
    shown = finish(
        search.start(
            "students",
            recipe,
            "student",
            "--distill.teacher",
            str(taught),
            "--trials",
            "2",
            "--scheduler",
            "none",
            "--students",
            "test_resnet,mobilenet_v2",
            "--multi-objective",
            "accuracy,latency",
        )
    )
    output, results = search.folder / "students", search.results("students")
    assert [trial.state for trial in results.trials] == ["finished"] * 2
    assert "soft labels: 100 %" in shown and "Pareto front" in shown
    for trial in results.trials:
        assert "soft labels" not in log_of(output, trial).read_text()
        best = []
        for name in ("test_resnet", "mobilenet_v2"):
            run = output / "trials" / f"{trial.number:05d}" / name
            recipe = load_recipe(run / "recipe.yaml")
            assert recipe.distill.bank == str(output / "bank") and recipe.model.backbone == name
            assert recipe.distill.temperature == trial.settings["distill.temperature"]
            best.append(max(line["accuracy"] for line in read_metrics(run) if line["kind"] == "eval"))
        assert trial.accuracy == pytest.approx(sum(best) / 2)
        assert trial.latency is not None and trial.latency > 0
    assert load_recipe(output / "best.yaml").model.backbone == "test_resnet"
    assert results.pareto and "Pareto" in (output / "report.html").read_text()


def test_trials_of_a_frozen_backbones_head_share_one_bank_of_features(search):
    space = {"model.region": {"choices": ["none", "threshold"]}, "contrast.center_weight": None}
    values = VALUES | {"data": VALUES["data"] | {"views": 2}, "optim": {"freeze": "backbone"}}
    recipe = search.recipe("frozen", values, search={"space": space})
    shown = finish(search.start("frozen", recipe, "teacher", "--trials", "3", "--scheduler", "none"))
    output, results = search.folder / "frozen", search.results("frozen")
    assert len(results.finished) == 3 and "features, train: 100 %" in shown
    described = json.loads((output / "features/train/bank.json").read_text())
    assert described["regions"] == ["none", "threshold, theta 0"]
    for trial in results.finished:
        run = output / "trials" / f"{trial.number:05d}"
        assert (run / "model.safetensors").is_file() and (run / "config.json").is_file()
        assert not any((run / name).exists() for name in ("features", "evaluation.json", "report.html"))


def test_joint_trials_share_teachers(search):
    short = {"train": VALUES["train"] | {"epochs": 1}}
    recipe = search.recipe("joint", VALUES, **short, search={"trials_per_teacher": 3})
    student = search.recipe("joint-student", STUDENT, **short)
    finish(
        search.start("joint", recipe, "joint", "--student-recipe", str(student), "--trials", "4", "--scheduler", "none")
    )
    output, results = search.folder / "joint", search.results("joint")
    assert [trial.state for trial in results.trials] == ["finished"] * 4
    served: dict[str, int] = {}
    for trial in results.trials:
        folder = load_recipe(output / "trials" / f"{trial.number:05d}" / "test_resnet/recipe.yaml").distill.teacher
        assert folder is not None
        served[folder] = served.get(folder, 0) + 1
        taught = load_recipe(Path(folder) / "recipe.yaml")
        assert taught.contrast.center_weight == trial.settings["teacher.contrast.center_weight"]
    assert len(served) == len(list((output / "teachers").iterdir())) < 4
    assert max(served.values()) in (2, 3)
    assert load_recipe(output / "best-teacher.yaml").task == "contrast"
    assert load_recipe(output / "best.yaml").distill.teacher in served


def test_a_population_hands_weights_on(search):
    # So that some do well and some badly.
    space = {"contrast.pairs": None, "contrast.num_pairs": None, "optim.lr": {"low": 1e-7, "high": 1e-3, "log": True}}
    recipe = search.recipe("population", VALUES, search={"space": space})
    finish(search.start("population", recipe, "teacher", "--trials", "4", "--scheduler", "pbt"))
    output, results = search.folder / "population", search.results("population")
    assert [(trial.state, trial.epoch) for trial in results.trials] == [("finished", 4.0)] * 4
    moved = [trial for trial in results.trials if _settings_in(log_of(output, trial))[0] != trial.settings]
    assert moved, "nobody took over another's weights"
    assert "settings changed on the way" in (output / "best.yaml").read_text()
    for trial in moved:
        assert _settings_in(log_of(output, trial))[-1] == trial.settings


def _settings_in(log: Path) -> list[Any]:
    return [json.loads(text) for text in re.findall(r"^trial \d+: (.*)$", log.read_text(), re.MULTILINE)]


def test_memory_processes_and_the_driver_may_be_lost(search):
    """A network too large for any machine; a trial's process killed; the driver killed, and the search resumed."""
    space = {"contrast.pairs": None, "contrast.num_pairs": None, "model.hidden": {"choices": [32, 10**10]}}
    epochs = {"train": VALUES["train"] | {"epochs": 12}}
    recipe = search.recipe("lost", VALUES, **epochs, search={"space": space})
    options = ("lost", recipe, "teacher", "--trials", "6", "--scheduler", "none")
    output = search.folder / "lost"
    process = search.start(*options)

    def at_work() -> list[Path]:
        """Logs of the trials that have saved something."""
        saved = output.glob("trials/*/checkpoints/step-*6.safetensors")
        return [output / "logs" / f"trial-{path.parents[1].name}-rank0.log" for path in saved]

    wait_for(at_work, process)
    victim = at_work()[0]
    os.kill(int(re.findall(r"process (\d+)", victim.read_text())[-1]), signal.SIGKILL)
    wait_for(lambda: "resuming from step" in victim.read_text(), process)

    def finished() -> list[int]:
        return [trial.number for trial in search.results("lost").finished]

    wait_for(lambda: finished() and at_work(), process, timeout=240)
    process.kill()
    process.communicate()
    before = {n: (output / f"trials/{n:05d}/metrics.jsonl").read_bytes() for n in finished()}
    interrupted = at_work()
    shown = finish(search.start(*options, "--resume"))

    results = search.results("lost")
    assert len(results.trials) == 6
    for trial in results.trials:
        if trial.settings["model.hidden"] == 32:
            assert (trial.state, len(losses(output / f"trials/{trial.number:05d}"))) == ("finished", 36)
        else:
            assert trial.state == "failed" and "out of memory" in str(trial.reason)
            assert f"trial {trial.number} failed: out of memory" in shown
    assert {trial.state for trial in results.trials} == {"finished", "failed"}
    for number, metrics in before.items():
        assert (output / f"trials/{number:05d}/metrics.jsonl").read_bytes() == metrics
    for log in interrupted:
        assert "resuming from step" in log.read_text()


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Order]]:
    with ray_cluster(2) as started:
        yield started


def test_a_trial_over_two_nodes_outlives_one_of_them(search, cluster):
    address, order = cluster
    recipe = search.recipe("nodes", VALUES, train=VALUES["train"] | {"epochs": 12})
    options = ["--trials", "2", "--scheduler", "none", "--workers-per-trial", "2", "--address", address]
    process = search.start("nodes", recipe, "teacher", *options, **CLUSTER)
    output = search.folder / "nodes"
    wait_for((output / "trials/00000/checkpoints/step-00000004.safetensors").is_file, process)
    first, second = (output / "logs" / f"trial-00000-rank{rank}.log" for rank in (0, 1))
    lost = node_of(second)
    assert lost != node_of(first)
    order("add")
    order(f"kill {lost}")
    finish(process)
    results = search.results("nodes")
    assert [trial.state for trial in results.trials] == ["finished"] * 2
    assert "resuming from step" in first.read_text()
    for trial in results.trials:
        run = output / f"trials/{trial.number:05d}"
        assert len(losses(run)) == 36
        assert json.loads((run / "environment.json").read_text())["world_size"] == 2
        assert lost not in (node_of(log_of(output, trial)), node_of(log_of(output, trial, 1)))


def test_what_no_cluster_can_hold_is_refused_at_once(search, cluster):
    recipe = search.recipe("tiny", VALUES)
    argv = search.argv("impossible", recipe, "teacher", "--workers-per-trial", "3", "--address", cluster[0])
    done = subprocess.run(argv, capture_output=True, text=True, env=environment() | CLUSTER, timeout=60)
    assert done.returncode == 2
    assert re.search(r"trial 3 x 1 CPU: the cluster's \d node\(s\) cannot hold one", done.stderr), done.stderr
    assert not (search.folder / "impossible").exists()


@pytest.mark.parametrize(
    ("sections", "stage", "options", "message"),
    [
        (
            {"search": {"space": {"contrast.lambda": {"choices": [1, 2]}}}},
            "teacher",
            [],
            r"search\.space\.contrast\.lambda: there is no such recipe field; did you mean 'contrast\.\w+'\?",
        ),
        ({"search": {"space": {"optim.lr": {"lo": 1, "high": 2}}}}, "teacher", [], "did you mean 'low'"),
        (
            {"search": {"space": {"seed": {"low": 0, "high": 9}}}},
            "teacher",
            [],
            r"search\.space\.seed: cannot be searched: it",
        ),
        (
            {"search": {"space": {"model.theta": {"low": 0, "high": 2}}}},
            "teacher",
            [],
            r"search\.space\.model\.theta 2\.0: input should be less than 1",
        ),
        (
            {"search": {"space": {"optim.name": {"low": 0, "high": 2}}}},
            "teacher",
            [],
            "is no number, so it has no range; give choices",
        ),
        ({}, "student", [], "task contrast: students are trained by task 'distill'"),
        ({}, "joint", [], "--student-recipe: stage 'joint' trains students, too"),
        ({}, "teacher", ["--multi-objective", "speed"], "--multi-objective speed: is not known; give accuracy"),
        ({}, "teacher", ["--trials", "0"], "--trials 0: leaves nothing to do"),
        (
            {},
            "teacher",
            ["--scheduler", "pbt", "--multi-objective", "accuracy,latency"],
            "--scheduler pbt: it knows one objective",
        ),
        (
            {"search": {"space": {"model.hidden": {"choices": [1, 2]}}}},
            "teacher",
            ["--scheduler", "pbt"],
            r"search\.space\.model\.hidden: cannot change while a network is trained",
        ),
        ({}, "teacher", ["--gpus-per-trial", "0.5"], r"--gpus-per-trial 0\.5: the cluster has no GPU"),
    ],
)
def test_bad_input(search, sections, stage, options, message):
    argv = search.argv("bad", search.recipe("bad", VALUES, **sections), stage, *options)
    done = run_command(argv, search.folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
