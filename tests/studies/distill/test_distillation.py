"""The real command on real Ray: alone on this machine, and on a cluster whose nodes come and go."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.studies.cluster import Slots
from fpcn_dist.studies.distill import distillation
from tests.helpers.distilling import make_teacher, recipe
from tests.helpers.launching import ROOT, TINY, finish, losses, run_command, start
from tests.helpers.ray_cluster import ENVIRONMENT as CLUSTER
from tests.helpers.ray_cluster import Order, node_of, ray_cluster, wait_for

pytestmark = pytest.mark.slow


class Command:
    """launch/distill.py with a tiny recipe and a teacher that costs no training."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.teacher = make_teacher(folder / "teacher")
        self.recipe = folder / "students.yaml"
        values = yaml.safe_load(TINY) | {"task": "distill", "name": "students"}
        values["data"]["views"] = 2
        self.recipe.write_text(yaml.safe_dump(values))

    def argv(self, output: Path | str, *options: str, **changed: object) -> list[str]:
        given = {"teacher": self.teacher, "data": self.data, "recipe": self.recipe} | changed
        named = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [
            sys.executable,
            str(ROOT / "launch/distill.py"),
            *named,
            "--output",
            str(self.folder / output),
            *options,
        ]

    def start(self, output: str, *options: str, **env: str) -> subprocess.Popen[str]:
        return start(self.argv(output, *options), self.folder, **env)


@pytest.fixture(scope="module")
def command(tmp_path_factory, rocks) -> Command:
    return Command(tmp_path_factory.mktemp("distill"), rocks)


@pytest.fixture(scope="module")
def undisturbed(command) -> tuple[Path, str]:
    """Two students and their baselines on this machine alone, and what the command printed."""
    process = command.start("undisturbed", "--students", "test_resnet,test_efficientnet", "--baselines")
    return command.folder / "undisturbed", finish(process)


def test_one_command_trains_measures_and_exports(undisturbed, command):
    output, shown = undisturbed
    order = ["teacher", "Plan", "soft-label bank", "training", "finished"]
    assert [shown.index(word) for word in order] == sorted(shown.index(word) for word in order)
    for name in ("test_resnet", "test_resnet-baseline", "test_efficientnet", "test_efficientnet-baseline"):
        assert RunFolder(output / name).read_outcome() == ("finished", None)
        assert len(losses(output / name)) == 12
        assert Evaluation.load(output / name) is not None
    assert (output / "test_resnet/model.onnx").is_file() and (output / "test_efficientnet/model.onnx").is_file()
    assert (output / "report.html").is_file() and (output / "distillation.json").is_file()
    # A baseline has no teacher: its loss is the cross-entropy.
    steps = [line for line in read_metrics(output / "test_resnet-baseline") if line["kind"] == "step"]
    assert all(line["loss"] == line["class_loss"] for line in steps)


def test_the_same_command_again_skips_what_is_finished(undisturbed, command):
    output, _ = undisturbed
    before = (output / "test_resnet/metrics.jsonl").read_bytes()
    again = command.start("undisturbed", "--students", "test_resnet,test_efficientnet", "--baselines")
    assert "4 run(s) at their end already" in finish(again)
    assert (output / "test_resnet/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_driver_that_is_ended_goes_on_from_the_checkpoints(undisturbed, command, number, status):
    name, options = f"ended by {number}", ["--students", "test_resnet,test_efficientnet"]
    output, process = command.folder / name, command.start(name, *options)
    wait_for((output / "test_resnet/checkpoints/step-00000002.safetensors").is_file, process)
    for _ in range(2):
        process.send_signal(number)
    shown, _ = process.communicate()
    assert process.returncode == status and "Traceback" not in shown, shown
    if number != signal.SIGKILL:
        words = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM with the checkpoints of its runs"
        assert shown.splitlines()[-1].startswith(words)
        assert not list(Path("/tmp").glob(f"fpcn-*/session_*_{process.pid}"))
    finish(command.start(name, *options))
    (log,) = (output / "logs").glob("*+*.log")
    assert "resuming from step" in log.read_text()
    for name in ("test_resnet", "test_efficientnet"):
        assert losses(output / name) == losses(undisturbed[0] / name)


def test_a_student_that_raises_is_retried_alone(undisturbed, command):
    output = command.folder / "raising"
    run = RunFolder(output / "test_efficientnet")
    process = command.start("raising", "--students", "test_resnet,test_efficientnet")
    wait_for(run.recipe.is_file, process)
    run.checkpoints.touch()  # a file where its checkpoints should be
    wait_for(run.outcome.is_file, process)
    assert run.read_outcome()[0] == "failed"
    run.checkpoints.unlink()
    assert "waiting to try again" in finish(process)
    assert (output / "logs/test_efficientnet-rank0.log").is_file()
    assert not (output / "logs/test_resnet-rank0.log").is_file()
    for name in ("test_resnet", "test_efficientnet"):
        assert losses(output / name) == losses(undisturbed[0] / name)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Order]]:
    with ray_cluster(3) as started:
        yield started


def test_groups_run_on_different_nodes_at_once_and_a_lost_node_costs_its_groups_alone(command, cluster):
    address, order = cluster
    output, names = command.folder / "nodes", ["test_resnet", "mobilenet_v2", "shufflenet_v2_x1_0"]
    # Equal costs: a node for each.
    place = Slots("CPU", 3, 1).bundle
    output.mkdir()
    (output / "costs.json").write_text(json.dumps({f"distill {name}, crop 32, fp32, {place}": 1.0 for name in names}))
    # Long enough to be at work at the same time, however unevenly a busy machine starts them.
    options = ["--students", ",".join(names), "--address", address, "--train.epochs", "12"]
    process = command.start("nodes", *options, **CLUSTER)
    wait_for((output / "test_resnet/checkpoints/step-00000004.safetensors").is_file, process)
    log = output / "logs/test_resnet-rank0.log"
    lost = node_of(log)
    order(f"kill {lost}")
    order("add")
    shown = finish(process)
    first_nodes = {re.findall(r"Ray node (\w+)", (output / f"logs/{n}-rank0.log").read_text())[0] for n in names}
    assert len(first_nodes) == 3
    spans = []
    for name in names[1:]:
        lines = read_metrics(output / name)
        spans.append((lines[0]["time"], lines[-1]["time"]))
        assert "resuming" not in (output / f"logs/{name}-rank0.log").read_text()
    assert max(start for start, _ in spans) < min(end for _, end in spans)
    assert "lost a process or a node" in shown
    assert node_of(log) != lost and int(re.findall(r"resuming from step (\d+)", log.read_text())[-1]) >= 4
    for name in names:
        assert len(losses(output / name)) == 36
        assert RunFolder(output / name).read_outcome()[0] == "finished"


def test_more_nodes_than_students_make_groups_of_several_ranks(command, cluster):
    """Also of a network, and in a folder, whose name could be taken for a path or a format."""
    options = [
        "--students",
        "torchvision/shufflenet_v2_x0_5",
        "--address",
        cluster[0],
        "--distill.teacher-mode",
        "online",
    ]
    finish(command.start("ranks {rank} {0}", *options, **CLUSTER))
    output, name = command.folder / "ranks {rank} {0}", "torchvision-shufflenet_v2_x0_5"
    assert len(list((output / "logs").glob(f"{name}-rank*.log"))) == 3
    assert json.loads((output / f"{name}/environment.json").read_text())["world_size"] == 3


def test_dry_run_prints_the_plan_alone(command):
    shown = finish(command.start("dry", "--students", "test_resnet", "--dry-run"))
    assert "Plan" in shown and "test_resnet" in shown
    assert not (command.folder / "dry").exists()


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (["--students", "resnet19"], {}, r"model\.backbone resnet19: .*did you mean 'resnet1"),
        (
            ["--students", "test_resnet,test_resnet"],
            {},
            "--students test_resnet,test_resnet: test_resnet is named twice",
        ),
        ([], {"teacher": "nowhere"}, r"distill\.teacher .*nowhere: holds no model\.safetensors; give the run folder"),
        (["--gpus", "2"], {}, r"--gpus 2: the cluster has 0 GPU\(s\); leave --gpus out"),
        (["--address", "127.0.0.1:1"], {}, r"--address 127\.0\.0\.1:1: no Ray cluster can be joined there"),
        (["--task", "contrast"], {}, "task contrast: students are trained by task 'distill'; use launch/recipes/dis"),
    ],
)
def test_bad_input(command, options, changed, message):
    done = run_command(command.argv("bad", *options, **changed), command.folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_refused_images_are_listed(rocks, tmp_path, monkeypatch, capsys):
    data = Path(shutil.copytree(rocks, tmp_path / "data"))
    (data / "basalt/broken.jpg").write_bytes(b"no image")
    student = recipe(distill={"teacher": str(make_teacher(tmp_path / "teacher"))})
    monkeypatch.setattr(distillation, "connect_ray", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(distillation, "find_slots", lambda _: Slots("CPU", 1, 1))
    distillation.distill(student, data, tmp_path / "out", students=["test_resnet"], dry_run=True)
    shown = capsys.readouterr().out
    assert "1 image(s) refused" in shown and "basalt/broken.jpg" in shown


def test_a_bank_of_another_teacher_is_refused(undisturbed, command, tmp_path):
    other = make_teacher(tmp_path / "other", seed=1)
    argv = command.argv(
        "another", "--students", "test_resnet", "--distill.bank", str(undisturbed[0] / "bank"), teacher=other
    )
    done = run_command(argv, command.folder)
    assert done.returncode == 2
    assert "holds the logits of something else (teacher" in done.stderr
