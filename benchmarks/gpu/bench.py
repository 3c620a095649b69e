"""The device, what it can do at best, and how calls are timed on it.

Calls are timed from a CUDA graph of about twenty, on inputs that rotate over three times the second-level cache, so
that each call finds its inputs in memory and the host's time is left out. Longer ones are timed one by one.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks._harness import Run, Spread, captured, copy_bandwidth, matmul_rate, timings

_QUERY = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
_QUERY += ("temperature.gpu", "power.draw", "power.limit")
_CALLS = 20
# Longer calls need no graph: what the host adds is less than a thousandth.
_LONG_MS = 20.0
_VERY_LONG_MS = 500.0
_WARM_SECONDS = 5


class Bench(NamedTuple):
    device: torch.device
    rehearsal: bool
    copy_bytes: float
    """Bytes a second that a copy reads and writes."""
    float32_flops: float
    """FLOP a second of large products of float32 multiply-adds."""
    float16_flops: float
    """FLOP a second of large float16 products in the matrix units."""

    @classmethod
    def of(cls, rehearsal: bool) -> Bench:
        """Warm the device up, and measure what it can do."""
        device = torch.device("cpu" if rehearsal else "cuda")
        size = 64 if rehearsal else 8192
        _warm_up(device, size, 0.1 if rehearsal else _WARM_SECONDS)
        bandwidth = copy_bandwidth(device, 2**20 if rehearsal else 2**30)
        return cls(
            device, rehearsal, bandwidth, matmul_rate(device, size), matmul_rate(device, size, dtype=torch.float16)
        )

    def copies(self, input_bytes: int) -> int:
        """How many copies of the inputs exceed the second-level cache three times."""
        if self.rehearsal:
            return 2
        return math.ceil(3 * torch.cuda.get_device_properties(self.device).L2_cache_size / input_bytes)

    def timed(self, runs: Sequence[Run], repeats: int = 15) -> dict[str, Any]:
        """Milliseconds of a call, and how they spread; ``runs`` are the same call on copies of its inputs."""
        few = timings({"call": runs[0]}, 1 if self.rehearsal else 3, "eager")["call"]
        if self.rehearsal or few.median_ms > _VERY_LONG_MS:
            return {**few._asdict(), "calls": 1}
        if few.median_ms > _LONG_MS:
            return {**timings({"call": runs[0]}, repeats, "eager")["call"]._asdict(), "calls": 1}
        turns = list(itertools.islice(itertools.cycle(runs), max(_CALLS, len(runs))))

        def all_turns() -> None:
            for run in turns:
                run()

        replay = captured(all_turns)
        replays = timings({"graph": replay}, repeats, "eager, L2 warm")["graph"]
        median, least, most = (ms / len(turns) for ms in (replays.median_ms, replays.min_ms, replays.max_ms))
        spread = Spread(median, least, most, repeats)
        return {**spread._asdict(), "calls": len(turns)}

    def peak_mib(self, run: Run) -> float | None:
        """Memory that a call needs above what is there before it."""
        if self.device.type != "cuda":
            return None
        run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def clocks() -> dict[str, Any]:
    """What nvidia-smi says of the first GPU: names as it has them, MHz, degrees Celsius and watts."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"skipped": "nvidia-smi is not on the PATH"}
    command = [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode or not done.stdout.strip():
        return {"failed": (done.stdout + done.stderr).strip()[:200]}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return {field: _number(value) for field, value in zip(_QUERY, values, strict=True)}


def _number(text: str) -> float | str | None:
    if text.startswith("["):  # [N/A], [Not Supported]
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _warm_up(device: torch.device, size: int, seconds: float) -> None:
    left = torch.randn(size, size, device=device)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(10):
            torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize()
