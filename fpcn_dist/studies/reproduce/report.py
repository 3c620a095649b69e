"""The report of a reproduction: one HTML file with the paper's numbers beside ours."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from fpcn_dist.runs.report.page import REPORT_FILE, write_page
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.reproduce.figures import draw
from fpcn_dist.studies.reproduce.tables import (
    CAVEAT,
    CSV,
    JSON,
    MARKDOWN,
    TITLE,
    Comparison,
    ReproductionResults,
    Row,
    RunRecord,
    Table,
    cells,
    percent,
    show,
    signed,
)

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_OURS = "FPCN"
_LONG = 18  # characters that a column is given on one line


def build_reproduction_report(output: Path, results: ReproductionResults) -> Path:
    """Write ``output``/report.html, which needs no other file to be read but links those of the runs.

    Args:
        output: folder of the reproduction, with the images of the comparisons and results.csv, .json and .md.
        results: what to show.

    Raises:
        UserError: an image of a comparison cannot be read, or the page not be written.
    """
    script = resources.files("fpcn_dist.runs.report").joinpath("sort.js").read_text(encoding="utf-8")
    runs = {run.folder for table in results.tables for row in table.rows for run in row.runs}
    return write_page(
        output,
        _TEMPLATE,
        title=TITLE,
        subtitle=f"data {results.data}, scale {results.scale}",
        tiles=_tiles(results),
        caveat=CAVEAT,
        results=results,
        # Markup: the SVG comes from matplotlib, which escapes its labels; the script is the package's own.
        tables=[_Section(table, Markup(draw(table)), _heads(table), _lines(table)) for table in results.tables],
        summary=_summary,
        pictures=[_pictures(output, comparison) for comparison in results.comparisons],
        links={
            folder: quote(f"{folder}/{REPORT_FILE}") for folder in runs if (output / folder / REPORT_FILE).is_file()
        },
        files=[name for name in (CSV, JSON, MARKDOWN) if (output / name).is_file()],
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


class _Head(NamedTuple):
    """A group of columns: a score over the paper's number, ours and so on; or a single column, without ``columns``."""

    text: str
    columns: tuple[str, ...] = ()
    style: str = ""


class _Cell(NamedTuple):
    text: str
    number: float | None = None
    style: str = ""


class _Section(NamedTuple):
    """A table as the page shows it."""

    table: Table
    chart: Markup
    heads: list[_Head]
    lines: list[list[_Cell]]


class _Picture(NamedTuple):
    """An image as a data URI, and what is said below it."""

    source: str
    title: str
    predicted: str = ""
    probability: float = 0.0
    right: bool = False


def _heads(table: Table) -> list[_Head]:
    headings = (table.name, *table.details)
    single = [_Head(heading, style=style) for heading, style in zip(headings, _styles(table), strict=True)]
    groups = [_Head(heading, table.columns(number), "group") for number, heading in enumerate(table.scores)]
    return [*single, *groups, _Head("seeds")]


def _lines(table: Table) -> list[list[_Cell]]:
    """The cells of each row under :func:`_heads`."""
    lines = []
    for row in table.rows:
        line = [
            _Cell(show(value), None if isinstance(value, str) else value, style)
            for value, style in zip((row.name, *row.details), _styles(table), strict=True)
        ]
        for number, score in enumerate(row.scores):
            entries = cells(score, table.columns(number))
            line += [_Cell(text, value, "" if place else "group") for place, (value, text) in enumerate(entries)]
        lines.append([*line, _Cell(str(row.seeds), row.seeds)])
    return lines


def _styles(table: Table) -> list[str]:
    """How names and details are set: numbers to the right, texts to the left, and long ones on several lines."""
    styles = []
    for number in range(1 + len(table.details)):
        texts = [value for row in table.rows if isinstance(value := (row.name, *row.details)[number], str)]
        styles.append("" if not texts else "text" if max(map(len, texts)) <= _LONG else "text wrap")
    return styles


def _summary(runs: Iterable[RunRecord]) -> str:
    """A line about runs before they are listed: how many there are, their commits and their devices."""
    runs = dict.fromkeys(runs)
    commits, devices = dict.fromkeys(run.commit for run in runs), dict.fromkeys(run.device for run in runs)
    plural = "s" if len(commits) > 1 else ""
    return f"{len(runs)} run{'s' * (len(runs) > 1)}, commit{plural} {', '.join(commits)}, on {', '.join(devices)}"


def _tiles(results: ReproductionResults) -> list[dict[str, str]]:
    """The headline: name, value and a note of each number that there is."""
    tiles = [
        *_accuracy_tiles(results),
        {"name": "images", "value": f"{results.images:,}", "note": f"{results.split} images, for every accuracy"},
        {"name": "seeds", "value": str(len(results.seeds)), "note": ", ".join(map(str, results.seeds))},
    ]
    rows = [row for table in results.tables for row in table.rows]
    missing = sum(bool(row.reason) for row in rows)
    note = f"{missing} incomplete, see the reasons" if missing else "complete"
    tiles.append({"name": "rows", "value": f"{sum(row.seeds > 0 for row in rows)} of {len(rows)}", "note": note})
    return tiles


def _accuracy_tiles(results: ReproductionResults) -> list[dict[str, str]]:
    """FPCN's accuracy in Table 2, and its lead over the best of the others there."""
    table = next((table for table in results.tables if table.key == "table2"), None)
    row = next((row for row in table.rows if row.name == _OURS), None) if table else None
    if table is None or row is None or row.scores[-1].mean is None:
        return []
    accuracy, paper = row.scores[-1].mean, row.scores[-1].paper
    note = "" if paper is None else f"the paper: {percent(paper)}\u00a0%, on other photographs"
    tiles = [{"name": _OURS, "value": f"{percent(accuracy)} %", "note": note}]
    others = [row for row in table.rows if row.name != _OURS]
    best = _best((row.scores[-1].mean, row) for row in others)
    theirs = _best((row.scores[-1].paper, row) for row in others)
    if best is not None:
        note = f"over {best[1].name}, {percent(best[0])}\u00a0%, the best of the others"
        if theirs is not None and paper is not None:
            note += f"; the paper: {signed(paper - theirs[0])} over {theirs[1].name}"
        tiles.append({"name": f"{_OURS}'s lead", "value": f"{signed(accuracy - best[0])} points", "note": note})
    return tiles


def _best(scores: Iterable[tuple[float | None, Row]]) -> tuple[float, Row] | None:
    """The highest score there is, and its row."""
    there = [(score, row) for score, row in scores if score is not None]
    return max(there, key=lambda entry: entry[0], default=None)


def _pictures(output: Path, comparison: Comparison) -> list[_Picture]:
    """The plain image, and each network's heat over it."""
    return [
        _Picture(_data_uri(output / comparison.jpeg), comparison.truth),
        *(
            _Picture(
                _data_uri(output / heatmap.jpeg),
                heatmap.title,
                heatmap.predicted,
                heatmap.probability,
                heatmap.predicted == comparison.truth,
            )
            for heatmap in comparison.heatmaps
        ),
    ]


def _data_uri(path: Path) -> str:
    try:
        return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        reason = f"an image of the report cannot be read ({error.strerror})"
        raise UserError("file", path, reason, "run the same command again, which draws it again") from error
