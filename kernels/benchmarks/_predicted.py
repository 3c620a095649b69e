"""What an H200 would need, from the machine code that it would run; for a machine without a GPU.

For each launch:    time = max(bytes / bandwidth, instructions / issue rate, matrix FLOPs / TF32 rate) + launch
    instructions = programs * warps * sum over loops(trips * instructions of one iteration)

with the instructions counted in the compiled code (sm_90), trips from the launch's grid and constants, and bytes those
that must travel from or to device memory at least once. Waiting (latency, barriers, an uneven last wave) is left out,
so these are estimates from below, and no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from _harness import show
from fpcn_kernels._compile import Compiled, LaunchRecord, compile_launch, specialize

ARCH = 90
BANDWIDTH = 4.8e12
# Four schedulers of each multiprocessor start an instruction of a warp per clock.
ISSUE_RATE = 132 * 4 * 1.755e9
TF32_RATE = 494.7e12
LAUNCH_SECONDS = 2e-6
# A warp's fused multiply-add.
FMA_FLOPS = 64


class Launch(NamedTuple):
    code: Compiled
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By name, constants included."""

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    def per_program(self, kind: str | None = None, trips: Sequence[float] = ()) -> float:
        """Instructions of a program, all or of one kind (``"matrix flops"``: FLOPs), with loops of depth d run
        ``trips[d]`` times."""
        total = _count(self.code.straight, kind)
        for loop in self.code.loops:
            total += math.prod(trips[: loop.depth + 1]) * _count(loop.counts, kind) / loop.unrolled
        return self.code.warps * total


class Work(NamedTuple):
    """Of a launch, or of several of the same kernel."""

    kernel: str
    launches: int
    bytes: float
    instructions: float
    matrix_flops: float = 0.0

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds."""
        return {
            "memory": self.bytes / BANDWIDTH,
            "instructions": self.instructions / ISSUE_RATE,
            "matrix units": self.matrix_flops / TF32_RATE,
        }

    @property
    def seconds(self) -> float:
        return max(self.bounds.values()) + self.launches * LAUNCH_SECONDS


def compile_all(records: Iterable[LaunchRecord]) -> list[Launch]:
    """Compiled for sm_90, each specialisation once."""
    compiled: dict[tuple[str, str], Compiled] = {}
    launches = []
    for record in records:
        source, options = specialize(record, ARCH)
        key = source.hash(), str(options)
        if key not in compiled:
            compiled[key] = compile_launch(record, ARCH)
        kernel, grid, arguments, constants = record
        launches.append(Launch(compiled[key], grid, dict(zip(kernel.arg_names, arguments, strict=False)) | constants))
    return launches


def show_prediction(sections: dict[str, list[Work]], notes: str) -> list[dict[str, Any]]:
    """Prints the section; gives its figures."""
    rows, figures = [], []
    for section, works in sections.items():
        for work in _by_kernel(works):
            bound = max(work.bounds, key=work.bounds.__getitem__)
            rows.append(
                [section, work.kernel, str(work.launches), f"{work.bytes / 1e6:.1f}", f"{work.instructions / 1e6:.2f}"]
                + [f"{work.matrix_flops / 1e9:.1f}", bound, f"{work.seconds * 1e6:.1f}"]
            )
            figures.append({"section": section, **work._asdict(), "bound": bound, "us": work.seconds * 1e6})
        total = sum(work.seconds for work in works)
        rows.append([section, "all", str(sum(w.launches for w in works)), "", "", "", "", f"{total * 1e6:.1f}"])
    print("\nPredicted for an H200 (not measured)")
    show(
        f"time = max(bytes / {BANDWIDTH / 1e12} TB/s, warp instructions / (132 * 4 * 1.755 GHz), matrix FLOPs / "
        f"{TF32_RATE / 1e12} TFLOP/s) + {LAUNCH_SECONDS * 1e6:.0f} us a launch",
        ["what", "kernel", "launches", "MB", "M instr.", "GFLOP matrix", "bound by", "us"],
        rows,
        left=2,
        caption="MB: that must travel from or to device memory once; instructions of a warp, as compiled for "
        f"sm_{ARCH}, times trips of their loops; without latency, barriers and uneven waves, so from below. {notes}",
    )
    return figures


def _by_kernel(works: list[Work]) -> list[Work]:
    kernels = dict.fromkeys(work.kernel for work in works)
    return [
        Work(kernel, *(sum(column) for column in zip(*(w[1:] for w in works if w.kernel == kernel), strict=True)))
        for kernel in kernels
    ]


def _count(counts: dict[str, int], kind: str | None) -> float:
    if kind is not None:
        return counts[kind]
    return sum(count for name, count in counts.items() if name not in ("global bytes", "matrix flops"))
