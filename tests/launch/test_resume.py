"""Killed runs go on with the same losses, on other ranks and engines too; what no longer fits is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.launching import Runs, command, environment, losses

DEEPSPEED = ("--engine.name", "deepspeed", "--engine.zero-stage", "2")


def kill_after(runs: Runs, output: Path, step: int, *overrides: str, launcher: str = "python") -> None:
    """Start training and kill -9 the whole process tree once ``step`` is in the metrics."""
    argv = [*command(launcher), *runs.train_argv(output, *overrides)]
    process = subprocess.Popen(
        argv,
        env=environment(),
        cwd=runs.folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count('"step"') < step:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=True)
    process.wait()


def copy_of(run: Path, name: str, *, keep_checkpoints_up_to: int) -> Path:
    """A run folder as an interruption would have left it after the checkpoint of that step."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("*.safetensors"):
        if path.name == "best.safetensors" or int(path.stem.split("-")[1]) > keep_checkpoints_up_to:
            path.unlink()
    return copy


def test_kill_9_and_the_same_command_again(runs, single):
    output = runs.folder / "killed"
    kill_after(runs, output, step=5)
    assert runs.train("killed") == output
    assert losses(output) == losses(single)
    assert (output / "model.safetensors").read_bytes() == (single / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ddp", ("python",)),
        ("single", ("torchrun",)),
        ("zero2", ("python",)),
        ("single", ("deepspeed", *DEEPSPEED)),
    ],
    ids=["2 ranks to 1", "1 rank to 2", "zero2 on 2 ranks to 1", "1 rank to zero2 on 2"],
)
def test_other_ranks_and_engines_continue(runs, single, first, second, request):
    name = request.node.callspec.id
    output = copy_of(request.getfixturevalue(first), name, keep_checkpoints_up_to=8)
    assert (output / "checkpoints/step-00000008.safetensors").exists()
    runs.train(name, *second[1:], launcher=second[0])
    assert losses(output) == pytest.approx(losses(single), abs=1e-4)


def test_a_damaged_newest_checkpoint_falls_back(runs, single):
    output = copy_of(single, "damaged", keep_checkpoints_up_to=8)
    newest = output / "checkpoints/step-00000008.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    done = runs.run([*command("python"), *runs.train_argv(output)])
    assert f"{newest} is damaged" in done.stdout and "resuming from step 6" in done.stdout
    assert losses(output) == losses(single)


def test_a_changed_recipe_is_refused(runs, single):
    done = runs.run([*command("python"), *runs.train_argv(single, "--optim.lr", "0.5")], expect=2)
    assert "optim.lr 0.001 -> 0.5" in done.stderr and "Traceback" not in done.stderr
    done = runs.run([*command("python"), *runs.train_argv(single, "--model.hidden", "8")], expect=2)
    assert "holds a finished run of another recipe: model.hidden 32 -> 8; choose another --output" in done.stderr


def test_changed_data_are_refused(runs, single, tmp_path):
    data = tmp_path / "rocks"
    shutil.copytree(runs.data, data)
    victim = next(data.glob("*/*.jpg"))
    shutil.copy(victim, victim.with_name("another.jpg"))
    output = copy_of(single, "other data", keep_checkpoints_up_to=8)
    done = runs.run([*command("python"), *runs.train_argv(output, data=data)], expect=2)
    assert "1 added, such as" in done.stderr and "another.jpg" in done.stderr


def test_resume_from_a_path_and_never(runs, single):
    output = runs.folder / "from a path"
    path = single / "checkpoints/step-00000010.safetensors"
    done = runs.run([*command("python"), *runs.train_argv(output, "--resume", str(path))])
    assert "resuming from step 10" in done.stdout
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [e["loss"] for e in entries if e["kind"] == "step"] == losses(single)[10:]
    for bad, words in ((output / "absent", "no such file"), (runs.recipe, "damaged or no checkpoint")):
        done = runs.run([*command("python"), *runs.train_argv(runs.folder / "new", "--resume", str(bad))], expect=2)
        assert words in done.stderr and "Traceback" not in done.stderr
    done = runs.run([*command("python"), *runs.train_argv(output, "--resume", str(runs.recipe))], expect=2)
    assert "holds a finished run" in done.stderr
    runs.train("from a path", "--resume", "never")
    assert losses(output) == losses(single)


def test_a_finished_run_is_reported_again_without_training(runs, single):
    before = losses(single)
    done = runs.run([*command("python"), *runs.train_argv(single)])
    assert "report" in done.stdout and losses(single) == before


def test_terminated_ranks_resume(runs, single):
    """SIGTERM, as a scheduler sends it before it takes the machine away: the run ends, and continues later."""
    output = runs.folder / "terminated"
    argv = [*command("python"), *runs.train_argv(output)]
    process = subprocess.Popen(argv, env=environment(), cwd=runs.folder, stdout=subprocess.PIPE, text=True)
    while not (output / "metrics.jsonl").exists() or '"step": 3' not in (output / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    runs.train("terminated")
    assert losses(output) == losses(single)
