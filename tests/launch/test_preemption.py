"""Signals end a run after a step, and it goes on as if nothing had been; so do fewer ranks; a folder has one run."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fpcn_dist.runs.metrics import read_metrics
from tests.helpers.launching import Runs, command, environment, losses
from tests.helpers.ray_cluster import wait_for


def start(runs: Runs, output: Path, *overrides: str, launcher: str = "python", ranks: int = 2) -> subprocess.Popen[str]:
    argv = [*command(launcher, ranks), *runs.train_argv(output, *overrides)]
    return subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps(run: Path) -> int:
    return len([line for line in read_metrics(run) if line["kind"] == "step"])


def test_a_signal_ends_the_run_after_a_step_and_it_goes_on(runs, single):
    # Neither logs nor checkpoints of their own accord.
    rarely = ["--train.log-every", "100", "--train.checkpoint-every", "100"]
    output = runs.folder / "signalled"
    process = start(runs, output, *rarely)
    wait_for(lambda: steps(output) >= 3, process)  # an evaluation is logged
    process.send_signal(signal.SIGUSR1)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGUSR1 after step" in shown and "Traceback" not in shown
    reached = steps(output)
    assert 3 <= reached < 12
    assert (output / f"checkpoints/step-{reached:08d}.safetensors").is_file()
    assert not (output / ".lock").exists()
    runs.train("signalled", *rarely)
    assert losses(output) == losses(single)
    ours, theirs = (load_file(run / "model.safetensors") for run in (output, single))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_all_ranks_stop_after_the_same_step_whichever_was_told(runs, ddp):
    output = runs.folder / "one-rank-told"
    process = start(runs, output, launcher="torchrun")
    wait_for(lambda: steps(output) >= 2, process)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    subprocess.run(["kill", "-USR1", ranks[1]], check=True)
    _, shown = process.communicate(timeout=90)
    # Not a failure to torchrun, which would start the ranks again.
    assert process.returncode == 0, shown
    assert shown.count("stopped by SIGUSR1") == 1
    reached = steps(output)
    assert reached < 12 and (output / f"checkpoints/step-{reached:08d}.safetensors").is_file()
    assert not (output / "model.safetensors").exists()
    runs.train("one-rank-told", launcher="torchrun")
    assert losses(output) == losses(ddp)


def test_fewer_ranks_go_on_with_parts_no_larger(runs, single):
    output = runs.folder / "fewer"
    process = start(runs, output, launcher="torchrun", ranks=3)
    wait_for(lambda: steps(output) >= 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert steps(output) < 12
    done = runs.run([*command("python"), *runs.train_argv(output)])
    assert "1 rank(s) where there were 3: each cuts its share of a batch into 3 parts" in done.stdout, done.stdout[:600]
    assert losses(output) == pytest.approx(losses(single), rel=1e-4)
    environment = json.loads((output / "environment.json").read_text())
    assert (environment["world_size"], environment["first_world_size"]) == (1, 3)


def test_a_folder_has_one_run_at_a_time(runs):
    output = runs.folder / "contested"
    process = start(runs, output, "--train.epochs", "200")
    try:
        wait_for(lambda: steps(output) >= 1, process)
        second = runs.run([*command("python"), *runs.train_argv(output, "--train.epochs", "200")], expect=2)
        assert f"another run is writing to it (process {process.pid} on" in second.stderr
    finally:
        process.kill()
        process.communicate()
    runs.train("contested", "--resume", "never")  # a dead one does not keep it
    assert len(losses(output)) == 12


def test_the_stall_of_each_checkpoint_is_reported(single):
    stalls = [line for line in read_metrics(single) if line["kind"] == "checkpoint"]
    assert {line["step"] for line in stalls} >= {2, 4, 6, 8, 10, 12}
    assert all(0 <= line["checkpoint_stall"] < 60 for line in stalls)
    assert "stall per checkpoint" in (single / "report.html").read_text()
