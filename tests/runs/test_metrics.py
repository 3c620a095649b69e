"""The record of a run: metrics.jsonl, TensorBoard, the progress line, and the arithmetic behind MFU."""

from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.models import resnet18

from fpcn_dist.models.cost import datasheet_flops, model_flops, peak_flops
from fpcn_dist.runs.metrics import METRICS_FILE, MetricsLogger, read_metrics
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.terminal import Terminal
from fpcn_dist.training.progress import Progress


def _log_steps(run_dir: Path, first: int, last: int, *, start_step: int = 0, offset: float = 0.0) -> None:
    logger = MetricsLogger(run_dir, 0, start_step=start_step)
    for step in range(first, last + 1):
        logger.log_step(step, step / 4, {"loss": step + offset, "lr": 0.1})
    logger.close()


def _scalars(run_dir: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_lines_hold_what_was_logged(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, 0)
    logger.log_step(3, 0.75, {"loss": 1.5, "class_loss": 1.0})
    logger.log_eval(4, 1.0, "val", {"loss": 0.5, "accuracy": 0.25})
    logger.log_replaced(4, "basalt/1.jpg", "truncated")
    lines = read_metrics(tmp_path)  # before close: every line is flushed
    logger.close()
    times = [line.pop("time") for line in lines]
    assert times == sorted(times) and times[0] > 1.7e9
    assert lines == [
        {"kind": "step", "step": 3, "epoch": 0.75, "loss": 1.5, "class_loss": 1.0},
        {"kind": "eval", "step": 4, "epoch": 1.0, "split": "val", "loss": 0.5, "accuracy": 0.25},
        {"kind": "replaced", "step": 4, "path": "basalt/1.jpg", "reason": "truncated"},
    ]
    assert _scalars(tmp_path, "train/loss") == {3: 1.5}
    assert _scalars(tmp_path, "val/accuracy") == {4: 0.25}


def test_resuming_drops_exactly_the_later_steps(tmp_path: Path) -> None:
    _log_steps(tmp_path, 1, 9)
    time.sleep(
        1.1
    )  # TensorBoard orders files by the second that they were begun in; no process resumes in the same one
    _log_steps(tmp_path, 7, 8, start_step=6, offset=0.5)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        *((step, step) for step in range(1, 7)),
        (7, 7.5),
        (8, 8.5),
    ]
    assert _scalars(tmp_path, "train/loss") == {step: step + 0.5 * (step > 6) for step in range(1, 9)}
    assert [path.name for path in tmp_path.iterdir() if path.name != "tensorboard"] == [METRICS_FILE]


def test_a_new_run_starts_an_empty_record(tmp_path: Path) -> None:
    _log_steps(tmp_path, 1, 5)
    _log_steps(tmp_path, 1, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"kind": "st', b'{"kind": "step", "step": 6, "loss"\n', b"\xff\x00", b"7"])
def test_a_torn_last_line_is_dropped_by_reader_and_resume(tmp_path: Path, torn: bytes) -> None:
    _log_steps(tmp_path, 1, 5)
    with open(tmp_path / METRICS_FILE, "ab") as file:
        file.write(torn)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    _log_steps(tmp_path, 6, 6, start_step=5)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_foreign_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    _log_steps(tmp_path, 1, 2)
    text = (tmp_path / METRICS_FILE).read_text()
    (tmp_path / METRICS_FILE).write_text(text.replace("\n", "\nhello\n", 1))
    with pytest.raises(UserError, match=rf"{METRICS_FILE}:2.*not a line of metrics"):
        read_metrics(tmp_path)


def test_no_file_reads_as_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_other_ranks_leave_no_trace(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, 1)
    logger.log_step(1, 0.1, {"loss": 1.0})
    logger.log_eval(1, 0.1, "val", {"loss": 1.0})
    logger.close()
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_ran_away_stay_valid_json(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, 0)
    logger.log_step(1, 0.1, {"loss": math.nan, "grad_norm": math.inf})
    logger.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["grad_norm"] is None


def _plain_progress(**options: int) -> tuple[Progress, io.StringIO]:
    output = io.StringIO()
    return Progress(100, console=Terminal(file=output), **options), output


def test_progress_without_a_terminal_is_one_line_per_log_point() -> None:
    progress, output = _plain_progress(start_step=10)
    with progress:
        for step in range(11, 31):
            progress.advance(step)
        progress.update(20, 2.0, {"loss": 0.123456, "accuracy": 0.5, "images_per_second": 99.6, "lr": 0.1})
        progress.update(30, 3.0, {"loss": 0.1})
        progress.print("saved [bold]")
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 20/100  epoch 2.00  loss 0.1235  accuracy 50.0 %  100 images/s  ETA 0:00:0")
    assert lines[1].startswith("step 30/100  epoch 3.00  loss 0.1000  ETA ")
    assert lines[2] == "saved [bold]"
    assert "\x1b" not in output.getvalue()


def test_progress_on_a_terminal_draws_a_bar() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with Progress(100, console=console) as progress:
        progress.update(50, 1.0, {"loss": 0.25})
    assert "50/100" in output.getvalue() and "loss 0.2500" in output.getvalue() and "━" in output.getvalue()


def test_progress_of_other_ranks_is_silent() -> None:
    progress, output = _plain_progress(rank=1)
    with progress:
        progress.update(50, 1.0, {"loss": 0.25})
        progress.print("hello")
    assert output.getvalue() == ""


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756.5e12, 378e12),
        ("NVIDIA H200", 989.5e12, 494.7e12),
        ("NVIDIA B200", 2250e12, 1100e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA RTX A5000", 111.1e12, 55.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA GB200", None, None),
        ("Some GPU", None, None),
    ],
)
def test_datasheet_flops(name: str, bf16: float | None, fp32: float | None) -> None:
    assert datasheet_flops(name, "bf16") == bf16
    assert datasheet_flops(name, "fp32") == fp32


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_model_flops_of_resnet18() -> None:
    model = resnet18().train()
    model.bn1.eval()
    flops = model_flops(model, 448)
    assert flops == pytest.approx(2 * 7.25e9, rel=0.01)  # 7.25 GMAC at 448 px
    assert model.training and model.layer1.training and not model.bn1.training
