"""This module gathers what a run folder holds into one HTML file that needs no network, no scripts, no other file."""

from __future__ import annotations

import base64
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.runs.probe import Probe
from fpcn_dist.runs.report.page import write_page
from fpcn_dist.runs.report.samples import FOLDER, read_samples
from fpcn_dist.runtime.errors import UserError

_TEMPLATE = Path(__file__).with_name("run.html.j2")
_SPLITS = ("train", "val", "test")
_LARGEST_MATRIX = 25
"""With more classes than this, the pairs most often confused are shown in place of the whole confusion matrix."""


def build_report(run_dir: Path) -> Path:
    """Write ``run_dir``/report.html from the files of the run that are there already, and return its path.

    Raises:
        UserError: no such folder, nothing of a run in it, or a damaged file.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError("run folder", run_dir, "there is no such folder", "give the --output folder of a training")
    recipe_text = _read(run_dir / "recipe.yaml")
    metrics = read_metrics(run_dir)
    if not recipe_text and not metrics:
        raise UserError("run folder", run_dir, "holds no run", "give the --output folder of a training")
    manifest = Manifest.load(run_dir / "manifest.json") if (run_dir / "manifest.json").is_file() else None
    environment = _read_environment(run_dir / "environment.json")
    evaluation = Evaluation.load(run_dir)
    probe = Probe.load(run_dir)
    samples = [(sample, _data_uri(run_dir / FOLDER / sample.file)) for sample in read_samples(run_dir)]
    replaced = [line for line in metrics if line["kind"] == "replaced"]

    return write_page(
        run_dir,
        _TEMPLATE,
        title=run_dir.resolve().name,
        subtitle=str(manifest.root) if manifest else "",
        tiles=_tiles(evaluation, manifest, metrics),
        charts=_charts(metrics),
        evaluation=evaluation,
        probe=probe,
        verdict=probe.verdict(evaluation) if probe else "",
        confusion=_confusion_rows(evaluation) if evaluation else [],
        confused=_most_confused(evaluation) if evaluation else [],
        mistakes=[entry for entry in samples if not entry[0].correct],
        correct=[entry for entry in samples if entry[0].correct],
        splits=_splits(manifest) if manifest else None,
        left_out=[
            ("Files refused before training", manifest.refused if manifest else []),
            ("About the data", manifest.notices if manifest else []),
            ("Files replaced during training", [(line["path"], line["reason"]) for line in replaced]),
        ],
        recipe_text=recipe_text,
        command=environment.get("command", ""),
        environment=_flatten({name: value for name, value in environment.items() if name != "command"}),
    )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _read_environment(path: Path) -> dict[str, object]:
    try:
        return json.loads(_read(path) or "{}")
    except ValueError as error:
        raise UserError("file", path, f"is not JSON ({error})", "remove it") from error


def _data_uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _tiles(
    evaluation: Evaluation | None, manifest: Manifest | None, metrics: Sequence[dict[str, Any]]
) -> list[dict[str, str]]:
    """Give name, value and a note of each number of the headline that there is."""
    tiles = []
    if evaluation:
        note = f"{evaluation.images:,} {evaluation.split} images, step {evaluation.step:,}"
        note += f" ({evaluation.checkpoint})" if evaluation.checkpoint else ""
        tiles.append({"name": "accuracy", "value": _percent(evaluation.accuracy), "note": note})
        balanced = {"name": "balanced accuracy", "value": _percent(evaluation.balanced_accuracy)}
        tiles.append(balanced | {"note": "mean over the classes"})
    if manifest:
        counts = Counter(image.split for image in manifest.images)
        note = ", ".join(f"{counts[split]:,} {split}" for split in _SPLITS if counts[split])
        tiles.append({"name": "images", "value": f"{len(manifest.images):,}", "note": note})
        tiles.append({"name": "classes", "value": str(len(manifest.classes)), "note": ""})
    evals = [line for line in metrics if line["kind"] == "eval" and line.get("accuracy") is not None]
    if evals:
        best = max(evals, key=lambda line: line["accuracy"])
        note = f"step {best['step']:,}, epoch {best['epoch']:.4g}"
        tiles.append({"name": f"best {best['split']} accuracy", "value": _percent(best["accuracy"]), "note": note})
    steps = [line for line in metrics if line["kind"] == "step"]
    if steps:
        last = steps[-1]
        tiles.append({"name": "last step", "value": f"{last['step']:,}", "note": f"epoch {last['epoch']:.4g}"})
        seconds = metrics[-1]["time"] - metrics[0]["time"]
        tiles.append({"name": "time", "value": _duration(seconds), "note": "first to last log entry"})
    stalls = [line["checkpoint_stall"] for line in metrics if line["kind"] == "checkpoint"]
    if stalls:
        note = f"median of {len(stalls):,}, longest {1000 * max(stalls):,.0f} ms"
        value = f"{1000 * statistics.median(stalls):,.0f} ms"
        tiles.append({"name": "stall per checkpoint", "value": value, "note": note})
    return tiles


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _charts(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """Give heading and SVG of each chart that has points. The SVG comes from matplotlib, which escapes its labels."""
    # Only the first rank draws, and only at the end: no other process need wait for matplotlib.
    from fpcn_dist.runs.report.figures import draw_curves, read_curves

    parts = sorted({name for line in metrics if line["kind"] == "step" for name in line if name.endswith("_loss")})
    losses = {"total": read_curves(metrics, "step", "loss")}
    losses |= {name.removesuffix("_loss"): read_curves(metrics, "step", name) for name in parts}
    losses["validation"] = read_curves(metrics, "eval", "loss")
    accuracies = {
        "training": read_curves(metrics, "step", "accuracy"),
        "validation": read_curves(metrics, "eval", "accuracy"),
    }
    charts = [
        ("Loss", draw_curves("loss", losses)),
        ("Accuracy", draw_curves("accuracy", accuracies, percent=True)),
        ("Learning rate", draw_curves("lr", {"learning rate": read_curves(metrics, "step", "lr")})),
        ("Images per second", draw_curves("speed", {"images/s": read_curves(metrics, "step", "images_per_second")})),
    ]
    return [(heading, Markup(svg)) for heading, svg in charts if svg]


@dataclass(frozen=True)
class _ConfusionRow:
    """A row holds the images of one class; a cell is (count, share of the row)."""

    name: str
    index: int
    total: int
    cells: list[tuple[int, float]]


def _confusion_rows(evaluation: Evaluation) -> list[_ConfusionRow]:
    """Give the rows of the confusion matrix, none where there are too many classes."""
    if len(evaluation.classes) > _LARGEST_MATRIX:
        return []
    return [
        _ConfusionRow(name, index, sum(row), [(count, count / max(1, sum(row))) for count in row])
        for index, (name, row) in enumerate(zip(evaluation.classes, evaluation.confusion, strict=True))
    ]


@dataclass(frozen=True)
class _Confused:
    """So many images of one class, a share of all its images, were taken for another."""

    truth: str
    predicted: str
    count: int
    share: float


def _most_confused(evaluation: Evaluation) -> list[_Confused]:
    names = evaluation.classes
    pairs = [
        _Confused(names[i], names[j], count, count / sum(row))
        for i, row in enumerate(evaluation.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair.count)[:_LARGEST_MATRIX]


@dataclass(frozen=True)
class _Splits:
    """The splits that there are, and rows of (class, its images in each of them)."""

    names: list[str]
    rows: list[tuple[str, list[int]]]


def _splits(manifest: Manifest) -> _Splits:
    """Count the images of each class in each split."""
    counts = Counter((image.label, image.split) for image in manifest.images)
    present = {image.split for image in manifest.images}
    names = [split for split in _SPLITS if split in present]
    rows = [(name, [counts[label, split] for split in names]) for label, name in enumerate(manifest.classes)]
    return _Splits(names, rows)


def _flatten(values: dict[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Turn nested values into (dotted name, text) rows."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
