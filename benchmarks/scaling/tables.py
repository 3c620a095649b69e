"""Bytes and memory of more ranks, measured on this machine, and the time of a step on many GPUs, computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.scaling.memory import Case, lone_rank_peaks
from benchmarks.scaling.model import (
    Inputs,
    StepPrediction,
    center_bytes,
    contrast_bytes,
    first_beyond,
    first_bound_by_host,
    gradient_bytes,
    predict,
)
from benchmarks.scaling.traffic import (
    CENTER,
    CHANNELS,
    CLASSES,
    CONTRAST,
    GRADIENTS,
    OTHER,
    RECIPE,
    Traffic,
    measure_traffic,
)
from fpcn_dist.recipe import command_line
from fpcn_dist.runtime.errors import UserError

GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
GLOBAL_IMAGES = (256, 1024, 4096, 16384)
_IMAGES_A_RANK, _RANKS = 32, 256
"""What stays fixed where memory is measured against the global batch."""
_SHARES = (0.1, 0.25, 0.5)
_200_CLASSES = {"classes": 200, "parameters": 46_058_248, "pair_ns": 22.6, "image_us": 21.3}
_MIB = 2**20


def scenarios(inputs: Inputs) -> dict[str, Inputs]:
    """``inputs``, and beside them other classes, arithmetic and pairs on the same GPUs."""
    many = replace(inputs, **_200_CLASSES)
    return {
        f"{inputs.classes} classes": inputs,
        "200 classes": many,
        "200 classes, float16": replace(many, pair_ns=5.37, image_us=2.56),
        "200 classes, 20 N random pairs": replace(many, pairs_per_image=20),
    }


def scaling_benchmark(inputs: Inputs, *, ranks: Sequence[int], images: int, measure: bool = True) -> dict[str, Any]:
    """Prints tables of bytes, memory and time, and all figures as one line of JSON.

    Args:
        inputs: of the model of a step's time.
        ranks: numbers of gloo ranks to start on this machine.
        images: of each of these ranks.
        measure: whether to measure at all; the model needs nothing of it.

    Raises:
        UserError: no number of ranks, or one below 1; no images.
    """
    if not ranks or min(ranks) < 1:
        raise UserError("--ranks", ranks, "needs numbers from 1 up", "give for example 1,2,4,8")
    if images < 1:
        raise UserError("--images", images, "a rank needs at least one image", "give for example 42")
    console, figures = Console(), {}
    if measure:
        measured = []
        for size in ranks:
            with console.status(f"Training steps of {size} rank(s)"):
                measured.append(measure_traffic(size, images))
        console.print(_traffic_table(measured))
        console.print(_calls_table(measured[-1]))
        with console.status("Memory of the contrast"):
            memory = measure_memory()
        console.print(_memory_table(memory))
        figures |= {"traffic": [_plain(traffic) for traffic in measured], "memory": memory}
    chosen = scenarios(inputs)
    for name, scenario in chosen.items():
        console.print(_prediction_table(name, [predict(scenario, gpus) for gpus in GPUS]))
    console.print(_limits_table(chosen))
    figures["model"] = {
        name: {"inputs": asdict(scenario), "steps": [_rounded(predict(scenario, gpus)) for gpus in GPUS]}
        for name, scenario in chosen.items()
    }
    print(json.dumps(figures))
    return figures


def measure_memory() -> list[dict[str, Any]]:
    """Peak bytes of the contrast on a rank, a row for each size of the global batch."""
    columns = {
        f"K 3, {_IMAGES_A_RANK} a rank": lambda total: Case(total // _IMAGES_A_RANK, _IMAGES_A_RANK, 3),
        "the same in a ring": lambda total: Case(total // _IMAGES_A_RANK, _IMAGES_A_RANK, 3, ring=True),
        f"K 3, {_RANKS} ranks": lambda total: Case(_RANKS, total // _RANKS, 3),
        f"K 200, {_IMAGES_A_RANK} a rank": lambda total: Case(total // _IMAGES_A_RANK, _IMAGES_A_RANK, 200),
        f"K 200, {_RANKS} ranks": lambda total: Case(_RANKS, total // _RANKS, 200),
    }
    peaks = iter(lone_rank_peaks([case(total) for total in GLOBAL_IMAGES for case in columns.values()]))
    return [{"images": total, **{name: next(peaks) for name in columns}} for total in GLOBAL_IMAGES]


def _traffic_table(measured: Sequence[Traffic]) -> Table:
    title = (
        f"Bytes that a rank sends in a step: {RECIPE.model.backbone}, {RECIPE.data.crop} px, D {RECIPE.model.hidden}"
    )
    names = "ranks", "N", "u and v", GRADIENTS, CONTRAST, CENTER, OTHER, "by gloo", "on the interface"
    table = _table(title, *names, left=3)
    for traffic in measured:
        for exchange in traffic.exchanges:
            way = "ring" if exchange.ring else "gathered"
            cells = [exchange.sent(purpose) for purpose in (GRADIENTS, CONTRAST, CENTER, OTHER)]
            cells.append(exchange.sent_by_gloo())
            seen = "-" if exchange.interface is None else f"{exchange.interface:,.0f}"
            table.add_row(str(traffic.ranks), str(traffic.images), way, *(f"{cell:,.0f}" for cell in cells), seen)
    last = measured[-1]
    gathered, ring = (contrast_bytes(last.images, RECIPE.model.hidden, last.ranks, ring=ring) for ring in (False, True))
    table.caption = (
        f"By the formulas, {last.ranks} ranks: gradients {gradient_bytes(last.parameters, last.ranks):,.0f} of "
        f"{last.parameters:,} parameters, contrast {gathered:,.0f} gathered and {ring:,.0f} in a ring, centre loss "
        f"{center_bytes(CLASSES, CHANNELS, last.ranks):,.0f}. gloo's reduce-scatter sends twice what is needed."
    )
    return table


def _calls_table(traffic: Traffic) -> Table:
    table = _table(f"Calls of a rank in a step, {traffic.ranks} ranks", "u and v", "for", "call", left=3)
    for name in ("calls", "bytes of tensors", "bytes sent"):
        table.add_column(name, justify="right")
    for exchange in traffic.exchanges:
        for call in exchange.calls:
            numbers = (f"{number:,.0f}" for number in (call.calls, call.payload, call.sent))
            table.add_row("ring" if exchange.ring else "gathered", call.purpose, call.kind, *numbers)
    return table


def _memory_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("MiB of the contrast on a rank at its peak, above its operands: C 2048, D 512, float32", *rows[0])
    for row in rows:
        table.add_row(str(row["images"]), *(f"{row[name] / _MIB:.1f}" for name in row if name != "images"))
    return table


def _prediction_table(name: str, predictions: Sequence[StepPrediction]) -> Table:
    names = ("GPUs", "N", "compute", "pairs", "exchange", "centre", "sum", "exposed", "host", "feed", "step", "bound")
    table = _table(f"Computed, not measured, ms: {name}", *names, "images/s", "efficiency", "contrast")
    alone = predictions[0].images_per_second / predictions[0].gpus
    for p in predictions:
        times = (p.compute, p.pairs, p.exchange, p.center, p.reduction, p.exposed, p.host, p.feed, p.step)
        shares = (p.images_per_second / p.gpus / alone, p.contrast_share)
        table.add_row(
            str(p.gpus),
            f"{p.images:,}",
            *(f"{time * 1e3:.2f}" for time in times),
            p.bound,
            f"{p.images_per_second:,.0f}",
            *(f"{share:.0%}" for share in shares),
        )
    return table


def _limits_table(chosen: dict[str, Inputs]) -> Table:
    names = (*(f"contrast > {share:.0%}" for share in _SHARES), "GPUs wait for host")
    table = _table("From how many GPUs on; contrast: share of the GPU's time", "case", *names, left=1)
    for name, inputs in chosen.items():
        counts = [first_beyond(inputs, share) for share in _SHARES] + [first_bound_by_host(inputs)]
        table.add_row(name, *("never" if count is None else f"{count:,}" for count in counts))
    return table


def _table(title: str, *names: str, left: int = 0) -> Table:
    table = Table(title=title)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < left else "right")
    return table


def _rounded(prediction: StepPrediction) -> dict[str, float]:
    """To the microsecond."""
    return {name: round(value, 6) for name, value in prediction._asdict().items()}


def _plain(traffic: Traffic) -> dict[str, Any]:
    exchanges = [
        exchange._asdict() | {"calls": [call._asdict() for call in exchange.calls]} for exchange in traffic.exchanges
    ]
    return traffic._asdict() | {"exchanges": exchanges}


def scaling(ranks: str = "1,2,4,8", images: int = 42, measure: bool = True, model: Inputs = Inputs()) -> None:  # noqa: B008
    """Bytes that ranks send and memory that they need, measured here; and the time of a step on up to 1,024 GPUs.

    Args:
        ranks: Numbers of gloo ranks to start on this machine, separated by commas.
        images: Images of each of these ranks.
        measure: Measure at all; else only compute.
        model: What the time of a step is computed from; docs/scaling.md names the sources.
    """
    try:
        sizes = [int(size) for size in ranks.split(",")]
    except ValueError:
        raise UserError("--ranks", ranks, "are numbers separated by commas", "give for example 1,2,4,8") from None
    scaling_benchmark(model, ranks=sizes, images=images, measure=measure)


def main() -> None:
    command_line.run(lambda: tyro.cli(scaling))
