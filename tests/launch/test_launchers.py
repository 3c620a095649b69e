"""However the script is started, whichever engine it uses: the same losses, the same files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fpcn_dist.runs.checkpoint import read_checkpoint
from tests.helpers.launching import command, environment, free_port, losses

FILES = {
    "recipe.yaml",
    "environment.json",
    "manifest.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "model.safetensors",
    "config.json",
    "README.md",
    "evaluation.json",
    "report.html",
    "samples",
}


def test_a_run_leaves_what_it_promises(single):
    assert {path.name for path in single.iterdir()} >= FILES
    evaluation = json.loads((single / "evaluation.json").read_text())
    assert evaluation["split"] == "test"
    assert evaluation["images"] == sum(row["images"] for row in evaluation["per_class"]) > 0
    assert len(losses(single)) == 12
    state, info = read_checkpoint(single / "checkpoints/best.safetensors")
    exported = load_file(single / "model.safetensors")
    assert all((state.weights[f"model.{name}"] == tensor).all() for name, tensor in exported.items())
    assert info.accuracy is not None


@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        ("deepspeed", ["--engine.name", "deepspeed", "--engine.zero-stage", "0"]),
        ("deepspeed", ["--engine.name", "deepspeed", "--engine.zero-stage", "1"]),
        ("deepspeed", ["--engine.name", "deepspeed", "--engine.zero-stage", "3"]),
        ("torchrun", ["--train.micro-batches", "3"]),
    ],
    ids=["zero0", "zero1", "zero3", "ddp in 3 parts"],
)
def test_two_ranks_give_the_losses_of_one(runs, single, launcher, overrides, request):
    same(runs.train(request.node.callspec.id, *overrides, launcher=launcher), single)


def test_two_ranks_of_others_give_the_losses_of_one(single, ddp, zero2):
    same(ddp, single)
    same(zero2, single)


def same(run: Path, single: Path) -> None:
    assert losses(run) == pytest.approx(losses(single), abs=1e-4)
    assert (json.loads((run / "evaluation.json").read_text()))["accuracy"] == pytest.approx(
        json.loads((single / "evaluation.json").read_text())["accuracy"], abs=0.101
    )


def test_srun_describes_ranks_in_its_own_variables(runs, single):
    """Two processes with the environment that srun gives them: no RANK, no WORLD_SIZE."""
    output = runs.folder / "srun"
    common = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    argv = [sys.executable, *runs.train_argv(output)]
    ranks = [
        subprocess.Popen(
            argv,
            env=environment() | common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=runs.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    shown = [process.communicate(timeout=240)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], shown
    assert losses(output) == pytest.approx(losses(single), abs=1e-4)
    assert json.loads((output / "environment.json").read_text())["world_size"] == 2


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--uts", "true"], stderr=subprocess.DEVNULL).returncode,
    reason="nothing may give this machine another name",
)
def test_ranks_meet_on_a_machine_whose_name_has_no_address(runs, tmp_path):
    launcher, *options = command("torchrun")
    argv = [launcher, "--local-addr", "127.0.0.1", *options, *runs.train_argv(tmp_path / "run", "--train.epochs", "1")]
    renamed = ["unshare", "--uts", "bash", "-c", 'hostname no-such-host-7; exec "$@"', "bash", *argv]
    done = subprocess.run(renamed, capture_output=True, text=True, env=environment(), timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cannot be retrieved" not in done.stderr and len(losses(tmp_path / "run")) == 3
