"""What an H200 would need, from the machine code that it would run; for a machine without a GPU.

For each launch:    time = max(bytes / bandwidth, instructions / issue rate, matrix FLOPs / their rate) + launch
    instructions = programs * warps * sum over loops(trips * instructions of one iteration)

with the instructions counted in the compiled code (sm_90), trips from the launch's grid and constants, and bytes those
that must travel from or to device memory at least once. Waiting (latency, barriers, an uneven last wave) is left out,
so these are estimates from below, and no measurement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from fpcn_kernels._launch import LaunchRecord, recording
from fpcn_kernels.pairs import backend_triton as pairs_triton
from fpcn_kernels.pairs.assemble import all_pairs
from fpcn_kernels.pairs.problem import Gradients, PairProblem
from fpcn_kernels.pooling import backend_triton as pooling_triton
from fpcn_kernels.shards import PassingRows
from torch import Tensor

from benchmarks._compile import Code, compile_code, specialize
from benchmarks._harness import show

ARCH = 90
# What a copy was measured to reach, read and written bytes both counted; the datasheet has 4.8 TB/s.
BANDWIDTH = 4.3e12
# Four schedulers of each multiprocessor start an instruction of a warp per clock.
ISSUE_RATE = 132 * 4 * 1.755e9
# Of the matrix units, dense.
TF32_RATE, HALF_RATE = 494.7e12, 989.5e12
LAUNCH_SECONDS = 2e-6
# A warp's fused multiply-add.
FMA_FLOPS = 64


class Launch(NamedTuple):
    code: Code
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """What the kernel was given, by name, constants included."""

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
    """What one launch does, or several of the same kernel."""

    kernel: str
    launches: int
    bytes: float
    instructions: float
    matrix_seconds: float = 0.0

    @property
    def bounds(self) -> dict[str, float]:
        """How many seconds each resource needs at least."""
        return {
            "memory": self.bytes / BANDWIDTH,
            "instructions": self.instructions / ISSUE_RATE,
            "matrix units": self.matrix_seconds,
        }

    @property
    def seconds(self) -> float:
        return max(self.bounds.values()) + self.launches * LAUNCH_SECONDS


def compile_all(records: Iterable[LaunchRecord], arch: int = ARCH) -> list[Launch]:
    """Compiled for a GPU of compute capability ``arch`` (90: 9.0), each specialisation once."""
    compiled: dict[tuple[str, str], Code] = {}
    launches = []
    for record in records:
        source, options = specialize(record, arch)
        key = source.hash(), str(options)
        if key not in compiled:
            compiled[key] = compile_code(record, arch)
        kernel, grid, arguments, constants = record
        launches.append(Launch(compiled[key], grid, dict(zip(kernel.arg_names, arguments, strict=False)) | constants))
    return launches


def masked_pool_launches(batch: int, channels: int, size: int, theta: float) -> tuple[Tensor, list[Launch]]:
    """bfloat16 features in channels_last, and the launches of their forward and backward."""
    features = torch.empty(batch, channels, size, size, dtype=torch.bfloat16, device="meta")
    features = features.to(memory_format=torch.channels_last)
    with recording() as records:
        pooled, mask, area = pooling_triton.forward(features, None, theta, largest=False)
        pooling_triton.backward(pooled, mask, area, theta, features.dtype, (0, 2, 3, 1))
    return features, compile_all(records)


def masked_pool_work(batch: int, channels: int, size: int, theta: float) -> tuple[list[Work], list[Work]]:
    """Forward and backward, of bfloat16 features in channels_last."""
    features, (find, pool, backward) = masked_pool_launches(batch, channels, size, theta)
    pooled_bytes = 4 * batch * channels
    splits = find.programs // batch
    # A program of the first kernel sums, which costs what pooling costs; one of an image's also finds the mask; and
    # all but those whose images are left to the second kernel pool.
    pooling = pool.per_program()
    finding = find.per_program() - 2 * pooling
    instructions = find.programs * (pooling + finding / splits) + (find.programs - pool.programs) * pooling
    forward = [
        Work(find.code.kernel, 1, features.nbytes + pooled_bytes, instructions),
        Work(pool.code.kernel, 1, 0, pool.programs * pooling),
    ]
    instructions = backward.programs * backward.per_program()
    return forward, [Work(backward.code.kernel, 1, features.nbytes + pooled_bytes, instructions)]


def pair_contrast_work(images: int, classes: int, channels: int, width: int, rounded: bool) -> list[Work]:
    """Forward and backward of all pairs, in float32 or ``rounded``: in float16, and the dense products in TF32."""
    empty = partial(torch.empty, device="meta")
    problem = PairProblem(
        x_BC=empty(images, channels),
        uv_B2D=empty(images, 2 * width),
        out_weight_CD=empty(channels, width),
        out_bias_C=empty(channels),
        cls_weight_KC=empty(classes, channels),
        cls_bias_K=empty(classes),
        labels_B=empty(images, dtype=torch.int64),
        first=0,
        relu=True,
        dropout=None,
        scale=empty(()),
        rounded=rounded,
    )
    others = PassingRows(0, problem.uv_B2D, torch.empty_like(problem.uv_B2D))
    with recording() as records:
        all_pairs(problem, others, None, Gradients.zeros(problem), pairs_triton.side_loss)
    dense = images * channels * width * (12 + 6 * (classes - 1))
    products = (0.0, dense / TF32_RATE) if rounded else (dense / FMA_FLOPS, 0.0)
    # Weights and their gradients once; ten products.
    works = [Work("dense products", 10, 24 * channels * width, *products)]
    for launch in compile_all(records):
        trips = _pair_trips(launch)
        instructions, flops = (launch.programs * launch.per_program(kind, trips) for kind in (None, "matrix flops"))
        seconds = flops / (HALF_RATE if rounded else TF32_RATE)
        works.append(Work(launch.code.kernel, 1, _pair_bytes(launch.arguments), instructions, seconds))
    return works


def pair_instructions(records: Iterable[LaunchRecord], pairs: int, width: int, arch: int) -> dict[str, float]:
    """Instructions of a thread for each pair and hidden unit of one side, by kernel, of its recorded launches."""
    totals: dict[str, float] = defaultdict(float)
    for launch in compile_all(records, arch):
        totals[launch.code.kernel] += launch.programs * launch.per_program(trips=_pair_trips(launch)) * 32
    return {kernel: total / pairs / width for kernel, total in totals.items()}


def _pair_trips(launch: Launch) -> list[float]:
    """Iterations of a program's loops by depth, on average over the programs."""
    given, grid = launch.arguments, launch.grid
    if launch.code.kernel == "scores_kernel":
        return [given["images"] / grid[1] if "BI" in given else math.ceil(given["D"] / given["BD"])]
    if launch.code.kernel == "own_kernel":
        return [math.ceil(given["others"] / (grid[2] if "BI" in given else 1) / given.get("BJ", 1))]
    if launch.code.kernel == "others_kernel":
        return [given["images"] / grid[2], *([math.ceil(given["L"] / given["BL"])] if "BL" in given else [])]
    return []


def _pair_bytes(given: dict[str, Any]) -> int:
    """Bytes of the tensors that a launch reads or writes, each once; without the scores, which stay in the L2."""
    unread = ("scores", "class_grad", "shift", "own_words", "others_words", "unit_words")
    return sum(t.nbytes for name, t in given.items() if isinstance(t, Tensor) and name not in unread)


def show_prediction(sections: dict[str, list[Work]], notes: str) -> list[dict[str, Any]]:
    """Prints the section; gives its figures."""
    rows, figures = [], []
    for section, works in sections.items():
        for work in _by_kernel(works):
            bound = max(work.bounds, key=work.bounds.__getitem__)
            rows.append(
                [section, work.kernel, str(work.launches), f"{work.bytes / 1e6:.1f}", f"{work.instructions / 1e6:.2f}"]
                + [f"{work.matrix_seconds * 1e6:.1f}", bound, f"{work.seconds * 1e6:.1f}"]
            )
            figures.append({"section": section, **work._asdict(), "bound": bound, "us": work.seconds * 1e6})
        total = sum(work.seconds for work in works)
        rows.append([section, "all", str(sum(w.launches for w in works)), "", "", "", "", f"{total * 1e6:.1f}"])
    print("\nPredicted for an H200 (not measured)")
    show(
        f"time = max(bytes / {BANDWIDTH / 1e12} TB/s, warp instructions / (132 * 4 * 1.755 GHz), matrix FLOPs / "
        f"{TF32_RATE / 1e12} or, in float16, {HALF_RATE / 1e12} TFLOP/s) + {LAUNCH_SECONDS * 1e6:.0f} us a launch",
        ["what", "kernel", "launches", "MB", "M instr.", "us matrix", "bound by", "us"],
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
