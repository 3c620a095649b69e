"""Renders a file of measurements: ``python -m benchmarks table FILE``; as Markdown where no terminal reads it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._harness import Spread, show
from benchmarks.gpu.log import read

_COLUMNS = ["part", "what", "ms (min - max)", "floor", "of floor", "remarks"]
_CAPTION = (
    "floor: of masked_pool, its bytes at the bandwidth of a copy; of pair_contrast, at highest precision its "
    "instructions at the rate of float32 multiply-adds, at high precision its products at that of float16 in the "
    "matrix units; all rates measured on the device"
)


def render(path: Path) -> None:
    """Print the newest measurement of each name and settings."""
    newest: dict[str, dict[str, Any]] = {}
    for line in read(path):
        newest[f"{line['part']} {line['name']} {line['settings']}"] = line
    lines = list(newest.values())
    last = lines[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    title = f"{last['device']}; {versions}; code {last['code']}, commit {last['commit'] or 'unknown'}; {last['date']}"
    rows = [row for line in lines for row in _rows(line)]
    if os.isatty(1):
        show(title, _COLUMNS, rows, left=2, caption=_CAPTION)
        return
    print(f"{title}\n")
    for cells in (_COLUMNS, ["---"] * len(_COLUMNS), *rows):
        print(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    print(f"\n{_CAPTION}")


def summary(line: dict[str, Any]) -> str:
    """The figures of a measurement in a line of text."""
    return "; ".join(" ".join(cell for cell in row[2:] if cell != "-") for row in _rows(line))


def _rows(line: dict[str, Any]) -> Iterator[list[str]]:
    what = " ".join([line["name"], *(f"{value}" for value in line["settings"].values())])
    if "median_ms" in line:
        yield [line["part"], what, *_time(line), _remarks(line)]
        return
    timed = [name for name, value in line.items() if isinstance(value, dict) and "median_ms" in value]
    for name in timed:
        yield [line["part"], f"{what}: {name}", *_time(line[name]), _remarks(line) if name == timed[-1] else ""]
    for name, metrics in line.get("kernels", {}).items():
        yield [line["part"], f"{what}: {name}", f"{metrics['ns'] / 1e6:.3f}", "-", "-", _listed(metrics)]
    if not timed and "kernels" not in line:
        yield [line["part"], what, "-", "-", "-", _remarks(line)]


def _time(figures: dict[str, Any]) -> list[str]:
    spread = Spread(*(figures[field] for field in Spread._fields))
    if "floor_ms" not in figures:
        return [str(spread), "-", "-"]
    return [str(spread), f"{figures['floor_ms']:.3g}", f"{figures['floor_ms'] / spread.median_ms:.0%}"]


def _remarks(line: dict[str, Any]) -> str:
    """What else there is: why it is missing, errors, memory, ratios, curves."""
    for name in ("failed", "skipped"):
        if name in line:
            return f"{name}: {line[name]}"
    known = {"part", "name", "settings", "date", "code", "commit", "device", "versions", "calls", "floor_ms", "curves"}
    return _listed({name: v for name, v in line.items() if name not in known and name not in Spread._fields})


def _listed(figures: dict[str, Any]) -> str:
    parts = []
    for name, value in figures.items():
        if isinstance(value, dict):
            if "median_ms" not in value:
                parts.append(f"{name}: {_listed(value)}")
        elif value is not None:
            parts.append(f"{name} {value:.3g}" if isinstance(value, float) and abs(value) < 1e3 else f"{name} {value}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the measurements of a file of `python -m benchmarks gpu`.")
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    if not path.is_file() or not list(read(path)):
        reason = "there are no measurements in it" if path.is_file() else "there is no such file"
        parser.error(f"{path}: {reason}; name a file of `python -m benchmarks gpu`, in benchmarks/results/")
    render(path)
