"""Checks and measures on a GPU all that needs one, in calls of a few minutes.

    python -m benchmarks gpu [--minutes 9] [--only tests|kernels|step|train|profile]

In order: versions and clocks; the GPU tests; masked_pool and pair_contrast; training steps; a training on each backend
and the decoding of images; each kernel under Nsight Compute. Every measurement is appended at once to
benchmarks/results/DATE-GPU.jsonl, which ``python -m benchmarks table FILE`` shows. Called again, it goes on where it
stopped: what the file has of the same code is not measured again, be it that it failed. Without a GPU all of it runs at
toy sizes under Triton's interpreter, which shows that it works, and no more.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fpcn_kernels._interpreter import interpret

from benchmarks.gpu.log import ROOT, Log, Measurement

PARTS = ("tests", "kernels", "step", "train", "profile")


def plan(bench: Any, time_left: Callable[[], float]) -> Iterator[Measurement]:
    """All measurements in their order."""
    from benchmarks.gpu import kernels, profiling, suite, whole

    yield from suite.plan(bench, time_left)
    yield from kernels.plan(bench)
    yield from whole.plan_steps(bench)
    yield from whole.plan_trainings(bench)
    yield from profiling.plan(bench, time_left)


def measured(measurement: Measurement) -> dict[str, Any]:
    """The figures, or why there are none: one measurement must not end the others."""
    try:
        return measurement.run()
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except (Exception, SystemExit) as error:
        said = str(error).strip().splitlines()
        return {"failed": f"{type(error).__name__}: {said[0] if said else ''}"[:300]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # of a device that an earlier error has left unusable
                torch.cuda.empty_cache()


def usable(device: torch.device) -> bool:
    """Whether the device still computes: an illegal access leaves it useless to this process."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def _ended_after(seconds: float, log: Log, measurement: Measurement) -> Iterator[None]:
    """End the process if a measurement hangs, and have the next call pass over it."""

    def end() -> None:
        log.append(*measurement[:3], {"failed": f"not over after {seconds:.0f} s"})
        print(f"{measurement}: not over after {seconds:.0f} s; call again to go on with the next", flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run(bench: Any, log: Log, only: list[str], deadline: float) -> bool:
    """Make the measurements that the file lacks until the deadline (:func:`time.monotonic`); whether none failed."""
    from benchmarks.gpu.bench import clocks
    from benchmarks.gpu.table import summary

    def time_left() -> float:
        return deadline - time.monotonic()

    left = [m for m in plan(bench, time_left) if m.part in only and not log.has(m)]
    well = True
    for done, measurement in enumerate(left):
        if time_left() < measurement.seconds:
            print(f"{len(left) - done} measurements are left, and too little time: call again to go on")
            break
        with _ended_after(max(1.0, time_left()), log, measurement):
            figures = measured(measurement)
        if measurement.part == "kernels" and not bench.rehearsal:
            figures["clocks"] = clocks()
        log.append(*measurement[:3], figures)
        line = {"part": measurement.part, "name": measurement.name, "settings": measurement.settings, **figures}
        print(f"{measurement}: {summary(line)}", flush=True)
        well = well and "failed" not in figures
        if not usable(bench.device):
            print("The device computes no more in this process: call again to go on with the next")
            break
    else:
        print("Everything is measured.")
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="it ends itself within so many (default 9)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts alone")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU even where there is a GPU")
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"argument --minutes: {options.minutes:g} leaves no time; give some above 0")
    deadline = time.monotonic() + 60 * options.minutes
    rehearsal = options.rehearse or not torch.cuda.is_available()
    if rehearsal:
        why = "as asked" if options.rehearse else "as there is no CUDA device"
        print(f"A rehearsal under Triton's interpreter at toy sizes, {why}: its figures mean nothing.", flush=True)
        interpret()
    from benchmarks.gpu.bench import Bench, clocks
    from benchmarks.gpu.table import render

    log = Log(ROOT / "benchmarks/results", torch.cuda.get_device_name()) if not rehearsal else _rehearsal_log()
    print(f"Measurements go to {os.path.relpath(log.path)}", flush=True)
    state = clocks()
    bench = Bench.of(rehearsal)
    rates = {f"{field}_per_second": getattr(bench, field) for field in ("copy_bytes", "float32_flops", "float16_flops")}
    log.append("machine", "clocks and rates", {}, {"before": state, "after": clocks(), **rates})
    well = run(bench, log, options.only, deadline)
    print()
    render(log.path)
    sys.exit(0 if well else 1)


def _rehearsal_log() -> Log:
    return Log(Path("runs/benchmarks"), "rehearsal")
