"""Plans the GPU tests, each a pytest of its own, in parallel where pytest-xdist is installed."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.log import ROOT, Measurement

# Tests at a time: they share the GPU's memory.
_WORKERS = 8
_MARKED = ("tests", "-m", "gpu")
# Those of all machines run their kernels on the GPU where there is one; what is compiled without one is left out.
_KERNELS = ("tests/kernels", "-m", "not gpu", "--ignore=tests/kernels/test_compiled.py")


def plan(bench: Bench, time_left: Callable[[], float]) -> Iterator[Measurement]:
    """The tests that need a GPU, then those of the kernels that run anywhere; of both a few where none is."""
    chosen = {"marked gpu": _MARKED, "kernels": _KERNELS}
    if bench.rehearsal:
        chosen = {"marked gpu": ("tests/kernels", "-m", "gpu"), "kernels": ("tests/kernels/test_launch.py",)}
    for name, words in chosen.items():
        run = functools.partial(run_tests, words, time_left)
        yield Measurement("tests", "tests", {"which": name}, 20 if bench.rehearsal else 150, run)


def run_tests(words: tuple[str, ...], time_left: Callable[[], float]) -> dict[str, Any]:
    """Outcomes of ``pytest WORDS``."""
    at_a_time = min(_WORKERS, os.cpu_count() or 1)
    workers = ["-n", str(at_a_time)] if importlib.util.find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *workers]
        try:
            done = subprocess.run(
                [*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, time_left() - 5)
            )
        except subprocess.TimeoutExpired as error:
            return {"failed": f"not over after {error.timeout:.0f} s"}
        if not report.exists():
            return {"failed": (done.stdout + done.stderr).strip()[-300:]}
        return outcomes(ElementTree.parse(report).getroot())


def outcomes(report: ElementTree.Element) -> dict[str, Any]:
    """How many tests of a JUnit report passed and were skipped, and which failed with what."""
    cases = list(report.iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    failures = {}
    for case in cases:
        for kind in ("failure", "error"):
            if (problem := case.find(kind)) is not None:
                failures[f"{case.get('classname')}::{case.get('name')}"] = (problem.get("message") or "")[:200]
    figures = {"passed": len(cases) - skipped - len(failures), "tests_skipped": skipped}
    if failures:
        figures |= {"failed": f"{len(failures)} of {len(cases)} tests", "failures": failures}
    return figures
