"""What a run tells about itself while it trains: metrics.jsonl, TensorBoard, and the live progress line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.tensorboard import SummaryWriter

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of ``run_dir``/metrics.jsonl, in order; empty where there is no such file.

    A last line that a killed run left torn is dropped.

    Raises:
        UserError: a line before the last is not a JSON object, so something else has written to the file.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}", None, f"is not a line of metrics ({error})", "remove that line, or the file"
            ) from None
        entries.append(entry)
    return entries


class MetricsLogger:
    """Rank 0's record of the run: a line of metrics.jsonl and points in TensorBoard for everything logged.

    Every line carries ``kind``, ``step`` and ``time`` (seconds since 1970). On other ranks nothing is written.

    Args:
        run_dir: the run folder; must exist.
        rank: global rank of this process.
        start_step: step to go on from. What an earlier attempt logged after it is dropped from both records, so that
            they read as if the run had never been interrupted.
    """

    def __init__(self, run_dir: Path, rank: int, *, start_step: int = 0) -> None:
        self._file, self._tensorboard = None, None
        if rank != 0:
            return
        run_dir = Path(run_dir)
        kept = [entry for entry in read_metrics(run_dir) if entry["step"] <= start_step] if start_step else []
        write_text(run_dir / METRICS_FILE, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = open(run_dir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def log_step(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Record what optimizer step ``step`` (the first is 1) yielded: losses, learning rate, images/s, ..."""
        self._write("step", step, values, epoch=epoch)

    def log_eval(self, step: int, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Record an evaluation on ``split`` of the weights after ``step`` steps."""
        self._write("eval", step, values, epoch=epoch, split=split)

    def log_replaced(self, step: int, path: str, reason: str) -> None:
        """Record that the image at ``path`` turned unreadable, and another was drawn in its place."""
        self._write("replaced", step, {}, path=path, reason=reason)

    def log_checkpoint(self, step: int, stall: float) -> None:
        """Record for how many seconds training stood still for the checkpoint after ``step`` steps: as long as the last
        one was still being written, and this one was copied from the device."""
        self._write("checkpoint", step, {"checkpoint_stall": stall})

    def close(self) -> None:
        if self._file is not None and self._tensorboard is not None:
            self._file.close()
            self._tensorboard.close()

    def _write(self, kind: str, step: int, values: Mapping[str, float], **context: Any) -> None:
        if self._file is None or self._tensorboard is None:
            return
        # JSON has no NaN: a loss that ran away is null in the file and NaN in TensorBoard.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        entry = {"kind": kind, "step": step, **context, **finite, "time": round(time.time(), 3)}
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()
        prefix = context.get("split", "train")
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)


_TAIL = 2**14


class Standing(NamedTuple):
    """What a run has logged last; ``None`` where there is nothing yet."""

    step: int | None = None
    epoch: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    """On the validation images."""
    images_per_second: float | None = None


def read_standing(run: Path) -> Standing:
    """Read what a run has logged last from the end of its metrics, however long these are."""
    path = run / METRICS_FILE
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return Standing()
    # The first line may be cut by the seek, the last one by a writer.
    found: dict[str, Any] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("kind") == "step":
            found |= {name: entry.get(name) for name in ("step", "epoch", "loss")}
            found["images_per_second"] = entry.get("images_per_second", found.get("images_per_second"))
        elif entry.get("kind") == "eval":
            found["accuracy"] = entry.get("accuracy")
    return Standing(**found)
