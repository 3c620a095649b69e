"""What the benchmarks share: timing, what this machine can do at best, and reports.

Sides take turns within a repeat, so that they share whatever else the machine does. On a GPU each is timed by events in
three modes: with the second-level cache flushed before each call, without (what a call left there serves the next), and
replayed from a CUDA graph, flushed, which leaves out what the host needs to launch it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch._functorch.config as functorch_config
from rich.console import Console
from rich.table import Table

Key = TypeVar("Key", bound=Hashable)
P = ParamSpec("P")
R = TypeVar("R")
Run = Callable[[], object]
GRAPH = "CUDA graph"
MODES = {"cpu": ("eager",), "cuda": ("eager", "eager, L2 warm", GRAPH)}


class Spread(NamedTuple):
    """How the milliseconds of a function spread over the repeats."""

    median_ms: float
    min_ms: float
    max_ms: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Spread:
        return cls(statistics.median(milliseconds), min(milliseconds), max(milliseconds), len(milliseconds))

    def __str__(self) -> str:
        digits = 3 if self.median_ms < 1 else 2 if self.median_ms < 10 else 1
        return f"{self.median_ms:.{digits}f} ({self.min_ms:.{digits}f} - {self.max_ms:.{digits}f})"


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def arguments(parser: argparse.ArgumentParser, name: str, repeats: int) -> argparse.Namespace:
    """Parses the command line with what every benchmark takes; sets the number of threads.

    Adds ``device``; ``json`` is where :func:`write_json` will write.
    """
    parser.add_argument("--repeats", type=positive, default=repeats, help=f"of each measurement (default {repeats})")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks") / f"{name}.json", help="figures go here")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    parsed.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return parsed


def timings(functions: Mapping[Key, Run], repeats: int, mode: str) -> dict[Key, Spread]:
    """Time of each function, after a call of each to warm up."""
    return {key: Spread.of(values) for key, values in milliseconds(functions, repeats, mode).items()}


def milliseconds(functions: Mapping[Key, Run], repeats: int, mode: str) -> dict[Key, list[float]]:
    """The milliseconds of each repeat, in their order."""
    if mode == GRAPH:
        functions = {key: captured(function) for key, function in functions.items()}
    for function in functions.values():
        function()
    measure = _cuda_milliseconds if "warm" in mode else _flushed if torch.cuda.is_available() else _cpu_milliseconds
    measured: dict[Key, list[float]] = {key: [] for key in functions}
    for repeat in range(repeats):
        # There and back, as whoever comes second finds the machine as the first one left it.
        for key in list(functions)[:: -1 if repeat % 2 else 1]:
            measured[key].append(measure(functions[key]))
    return measured


def _cpu_milliseconds(function: Run) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _cuda_milliseconds(function: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _flushed(function: Run) -> float:
    torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda").zero_()
    return _cuda_milliseconds(function)


def captured(function: Run) -> Run:
    """The replay of a CUDA graph of what the function launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def compiled(function: Callable[P, R], *example: P.args, **options: P.kwargs) -> Callable[P, R] | str:
    """``function`` under torch.compile, called once, or why that failed."""
    # Backward passes are timed alone, which keeps what the forward pass saved.
    functorch_config.donated_buffer = False  # pyright: ignore[reportAttributeAccessIssue]
    result = torch.compile(function, dynamic=False)
    try:
        result(*example, **options)
    # Inductor lacks a C++ compiler, memory, ...: whatever it is stands in the table.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    return result


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes per second of a large copy on the device, of ``size`` bytes; bytes read and written both counted."""
    source = torch.ones(size or (2**30 if device.type == "cuda" else 2**28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timings({"copy": lambda: target.copy_(source)}, 9, "eager")["copy"].median_ms / 1e3
    return 2 * source.numel() / seconds


def matmul_rate(
    device: torch.device, size: int | None = None, *, tf32: bool = False, dtype: torch.dtype = torch.float32
) -> float:
    """FLOP per second of a large product of square matrices, of float32 in TF32 if asked for."""
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        seconds = timings({"product": lambda: left @ right}, 9, "eager")["product"].median_ms / 1e3
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / seconds


def machine(device: torch.device) -> str:
    """What the figures were measured on, and when."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = models[0].split(":")[1].strip() if models else platform.machine()
        name = f"{model}, {torch.get_num_threads()} of {len(os.sched_getaffinity(0))} cores, no GPU"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}; {datetime.date.today()}"


def show(title: str, columns: list[str], rows: list[list[str]], left: int, caption: str = "") -> None:
    """Prints a table whose first ``left`` columns are text."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if os.isatty(1) else 150).print(table)


def write_json(path: Path, report: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Figures: {path}")
