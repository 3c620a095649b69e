"""Plans the profiles of each kernel by Nsight Compute (``ncu``), where that is on the PATH."""

from __future__ import annotations

import csv
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.kernels import PRECISIONS
from benchmarks.gpu.log import ROOT, Measurement

METRICS = {
    "gpu__time_duration.sum": "ns",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_slots_busy_percent",
    "smsp__inst_executed.sum": "instructions",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes.sum": "dram_bytes",
    "launch__registers_per_thread": "registers",
}
"""ncu's name of each metric, and ours."""


def plan(bench: Bench, time_left: Callable[[], float]) -> Iterator[Measurement]:
    """Few classes and many, at both precisions."""
    for classes in (3, 200):
        for precision in PRECISIONS:
            settings = {"classes": classes, "precision": precision}
            run = functools.partial(profile, time_left, **settings)
            yield Measurement("profile", "ncu", settings, 90, run)


def profile(time_left: Callable[[], float], classes: int, precision: str) -> dict[str, Any]:
    """The metrics of each kernel by its name."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"skipped": "ncu is not on the PATH"}
    from benchmarks.gpu.each_kernel import names

    command = [tool, "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
    command += ["--kernel-name-base", "function", "--kernel-name", f"regex:^({'|'.join(names(classes))})$"]
    command += ["--metrics", ",".join(METRICS), sys.executable, "-m", "benchmarks.gpu.each_kernel"]
    try:
        done = subprocess.run(
            [*command, str(classes), precision],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(1.0, time_left() - 5),
        )
    except subprocess.TimeoutExpired as error:
        return {"failed": f"ncu was not over after {error.timeout:.0f} s"}
    kernels = read_raw(done.stdout)
    if not kernels:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return {"failed": "ncu: " + " ".join(said[-3:])[:300]}
    return {"kernels": kernels}


def read_raw(shown: str) -> dict[str, dict[str, float]]:
    """Of what ``ncu --csv --page raw`` prints, the metrics by kernel; of several launches of one the sums, but the
    means of percentages and registers. The table follows ncu's own remarks: names, their units, and a row a launch."""
    lines = shown.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    launches: dict[str, list[dict[str, float]]] = {}
    for row in list(csv.DictReader(lines[start:]))[1:]:
        if row.get("Kernel Name"):
            found = {ours: float(row[name].replace(",", "")) for name, ours in METRICS.items() if row.get(name)}
            launches.setdefault(row["Kernel Name"], []).append(found)
    return {kernel: {"launches": len(rows), **_together(rows)} for kernel, rows in launches.items()}


def _together(rows: list[dict[str, float]]) -> dict[str, float]:
    sums = {name: sum(row[name] for row in rows) for name in rows[0]}
    summed = ("ns", "instructions", "dram_bytes")
    return {name: value if name in summed else value / len(rows) for name, value in sums.items()}
