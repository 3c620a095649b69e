"""Runs of the real commands, with the real launchers, on tiny photographs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from tests.helpers.forked import run_script

ROOT = Path(__file__).parents[2]
TINY = """
name: tiny
data:
  {resize: 40, crop: 32, classes_per_batch: null, images_per_class: 4, val_fraction: 0.2, test_fraction: 0.2,
  threads: 1}
model: {backbone: test_resnet, pretrained: false, norm: frozen_batch, hidden: 32}
optim: {lr: 0.001, warmup_epochs: 1}
train: {epochs: 4, log_every: 1, checkpoint_every: 2, eval_every: 1, keep_checkpoints: 4}
"""
"""3 steps of 12 images an epoch on the 24 images per class of the fixture, 14 of which train.

timm's smallest ResNet, whose checkpoints are small, too. Frozen BatchNorm: with GroupNorm over the 1 x 1 maps of so
small an image, rounding grows a hundredfold in a few steps.
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command(launcher: str, ranks: int = 2) -> list[str]:
    """How a user starts a script of launch/ with this launcher."""
    bin_dir = Path(sys.executable).parent
    return {
        "python": [sys.executable],
        "torchrun": [
            str(bin_dir / "torchrun"),
            f"--nproc-per-node={ranks}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        ],
        "deepspeed": [str(bin_dir / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())],
    }[launcher]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path, "COLUMNS": "160"}


def start(argv: list[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    """A command under way in ``folder``, with further variables; all that it prints in one stream."""
    return subprocess.Popen(
        argv, env=environment() | env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 500) -> str:
    """Wait for a command of :func:`start`, which must succeed; gives what it printed."""
    try:
        shown, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, shown
    return shown


def run_command(argv: list[str], folder: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """What a command prints, and how it ends; a script that Python alone starts is run in a forked process."""
    if argv[0] == sys.executable and argv[1].endswith(".py"):
        return run_script(argv[1:], folder, environment(), timeout)
    return subprocess.run(argv, capture_output=True, text=True, env=environment(), timeout=timeout, cwd=folder)


class Runs:
    """Starts commands and reads what they leave."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        # Each worker of pytest-xdist has a folder of its own in that of the session.
        session = folder.parents[1 if "PYTEST_XDIST_WORKER" in os.environ else 0]
        self._shared = session / "shared runs"
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(TINY)

    def train_argv(self, run: Path, *overrides: str, data: Path | None = None) -> list[str]:
        base = [str(ROOT / "launch/train.py"), "--recipe", str(self.recipe), "--data", str(data or self.data)]
        return [*base, "--output", str(run), *overrides]

    def run(self, argv: list[str], *, expect: int | None = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """A command to its end; see :func:`run_command`."""
        done = run_command(argv, self.folder, timeout=timeout)
        if expect is not None:
            assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
        return done

    def train(self, name: str, *overrides: str, launcher: str = "python", ranks: int = 2, **run) -> Path:
        """Train to the end and return the run folder."""
        output = self.folder / name
        self.run([*command(launcher, ranks), *self.train_argv(output, *overrides)], **run)
        return output

    def shared(self, name: str, *overrides: str, launcher: str = "python") -> Path:
        """A copy of an undisturbed run, which only the first of all workers that need it trains."""
        run, copy = self._shared / name, self.folder / name
        self._shared.mkdir(exist_ok=True)
        with open(f"{run}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (run / "report.html").is_file():
                argv = [*command(launcher), *self.train_argv(run, *overrides)]
                finish(start(argv, self.folder))  # what others are compared with is started as a user starts it
        if not copy.exists():
            shutil.copytree(run, copy)
        return copy


def losses(run: Path) -> list[float]:
    """Loss of every step, in order, each step once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return [line["loss"] for line in steps]
