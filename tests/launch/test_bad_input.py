"""Every mistake a user is likely to make: one line that names field, value, reason and hint; never a traceback."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.launching import ROOT, Runs, command, environment, free_port, losses


def copy_data(runs: Runs, folder: Path) -> Path:
    shutil.copytree(runs.data, folder / "rocks")
    return folder / "rocks"


def refused(runs: Runs, *overrides: str, data: Path | None = None, output: str = "refused") -> str:
    """Message of a run that must be refused."""
    argv = [*command("python"), *runs.train_argv(runs.folder / output, *overrides, data=data)]
    done = runs.run(argv, expect=2)
    assert "Traceback" not in done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def test_no_such_folder(runs, tmp_path):
    message = refused(runs, data=tmp_path / "absent")
    assert "absent" in message and "no such folder" in message


def test_one_class_only(runs, tmp_path):
    data = copy_data(runs, tmp_path)
    shutil.rmtree(data / "marble")
    shutil.rmtree(data / "basalt")
    assert "dolomite" in refused(runs, data=data)


def test_a_class_too_small_for_a_batch(runs, tmp_path):
    data = copy_data(runs, tmp_path)
    for path in sorted((data / "basalt").glob("*.jpg"))[4:]:
        path.unlink()
    message = refused(runs, data=data)
    assert "basalt" in message and "images_per_class" in message


def test_bad_images_are_listed_or_refused(runs, tmp_path):
    data = copy_data(runs, tmp_path)
    (data / "marble/text.jpg").write_text("no image")
    whole = next((data / "marble").glob("0*.jpg")).read_bytes()
    (data / "marble/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "marble/empty.jpg").write_bytes(b"")
    message = refused(runs, "--on-bad-image", "fail", data=data)
    assert "3" in message and "text.jpg" in message
    argv = [*command("python"), *runs.train_argv(runs.folder / "skips", "--train.epochs", "1", data=data)]
    done = runs.run(argv)
    for name in ("text.jpg", "truncated.jpg", "empty.jpg"):
        assert name in done.stdout
    assert "text.jpg" in (runs.folder / "skips/report.html").read_text()


def test_fields_and_types(runs):
    assert "momentum" in refused(runs, "--optim.momentun", "0.5")
    assert "invalid" in refused(runs, "--train.epochs", "many")


def test_a_batch_that_does_not_divide(runs):
    argv = [*command("torchrun"), *runs.train_argv(runs.folder / "uneven", "--data.images-per-class", "3")]
    done = runs.run(argv, expect=None)
    assert done.returncode != 0
    assert "9 images" in done.stderr and "2 ranks" in done.stderr and "try" in done.stderr
    # torchrun adds its own traceback, and its report; what the user must read is what that ends with.
    *_, last, border = done.stderr.strip().splitlines()
    assert set(border) == {"="} and re.match(r" *traceback : rank \d: error: data.images_per_class", last)


def test_micro_batches_that_do_not_divide(runs):
    message = refused(runs, "--train.micro-batches", "5")
    assert "train.micro_batches 5" in message and "12 images" in message and "try 4" in message


def test_an_output_folder_of_something_else(runs, tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    argv = [*command("python"), *runs.train_argv(tmp_path)]
    done = runs.run(argv, expect=2)
    assert "thesis.tex" in done.stderr and (tmp_path / "thesis.tex").read_text() == "text"


def test_evaluating_what_is_no_run(runs, tmp_path):
    done = runs.run([*command("python"), str(ROOT / "launch/evaluate.py"), str(tmp_path)], expect=2)
    assert "holds no run" in done.stderr and "Traceback" not in done.stderr


def test_port_in_use(runs):
    port = str(free_port())
    import socket

    with socket.socket() as holder:
        holder.bind(("0.0.0.0", int(port)))
        holder.listen()
        env = environment() | {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        argv = [sys.executable, *runs.train_argv(runs.folder / "port")]
        done = subprocess.run(argv, env=env, cwd=runs.folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"MASTER_PORT {port}" in done.stderr and "already in use" in done.stderr


def test_a_rank_that_dies_is_noticed_within_a_minute(runs):
    """Two ranks that no launcher watches; one is killed in the middle of training."""
    port, output = str(free_port()), runs.folder / "orphan"
    ranks = []
    for rank in range(2):
        env = environment() | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        argv = [sys.executable, *runs.train_argv(output, "--train.epochs", "500")]
        ranks.append(
            subprocess.Popen(argv, env=env, cwd=runs.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or '"step": 3' not in (output / "metrics.jsonl").read_text():
        assert all(process.poll() is None for process in ranks) and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGKILL)
    _, message = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 3, message
    assert "lost contact with another rank" in message and "resumes from the last checkpoint" in message
    assert "Traceback" not in message


def test_a_loss_that_runs_away(runs):
    overrides = ("--optim.lr", "1e30", "--optim.warmup-epochs", "0")
    done = runs.run([*command("python"), *runs.train_argv(runs.folder / "nan", *overrides)], expect=2)
    assert "is not finite" in done.stderr and "lower optim.lr" in done.stderr and "checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_fills_up(runs, single):
    """Files may not grow past 1 MiB, so the first checkpoint fails as on a full disk: a clear message, no half file."""
    output = runs.folder / "full"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    argv = [*command("python"), *runs.train_argv(output)]
    done = subprocess.run(
        argv, env=environment(), cwd=runs.folder, capture_output=True, text=True, timeout=120, preexec_fn=limit
    )
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr and "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((output / "checkpoints").iterdir()) == []
    runs.train("full")
    assert losses(output) == losses(single)


def test_pretrained_weights_without_a_network(runs, tmp_path):
    env = environment() | {"HF_HUB_OFFLINE": "1", "TORCH_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    overrides = ("--model.pretrained", "True", "--model.norm", "batch")
    argv = [*command("python"), *runs.train_argv(runs.folder / "offline", *overrides)]
    done = subprocess.run(argv, env=env, cwd=runs.folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "model.pretrained" in done.stderr and "false" in done.stderr and "Traceback" not in done.stderr
