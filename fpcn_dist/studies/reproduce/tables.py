"""What came out of a reproduction: tables with the paper's numbers beside ours; results.json, .csv and .md."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fpcn_dist import __version__
from fpcn_dist.runtime.files import write_text
from fpcn_dist.runtime.names import markdown, printable

JSON, CSV, MARKDOWN = "results.json", "results.csv", "results.md"

TITLE = "The paper's tables on other data"
CAVEAT = (
    "The paper's numbers are for the paper's own photographs, which are not public. A difference from them tells how "
    "much harder or easier other photographs are as well as how well the method was repeated: compare our rows with "
    "each other."
)
"""What every form of the results says."""


@dataclass(frozen=True)
class Score:
    """A number of the paper beside ours, in percent (or percentage points).

    Attributes:
        paper: ``None`` where the paper gives none.
        ours: one for each seed that has a result.
    """

    paper: float | None
    ours: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.ours) if self.ours else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; ``None`` for fewer than two."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.mean is None or self.paper is None else self.mean - self.paper


@dataclass(frozen=True)
class RunRecord:
    """A run that a row comes from.

    Attributes:
        folder: relative to the output folder, with forward slashes.
        seed: the seed of the training.
        command: what repeats it.
        commit: the commit of fpcn-dist that computed it; its version where there was no checkout.
        device: that it ran on.
    """

    folder: str
    seed: int
    command: str
    commit: str
    device: str


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: the name of a system or a setting.
        details: under the table's ``details`` headings; ``None`` is an empty cell.
        scores: under its ``scores`` headings.
        runs: where the scores come from.
        reason: why there is no result, or not from every seed; empty if nothing is missing.
    """

    name: str
    details: tuple[str | float | None, ...]
    scores: tuple[Score, ...]
    runs: tuple[RunRecord, ...] = ()
    reason: str = ""

    @property
    def seeds(self) -> int:
        """How many trainings there is a result of."""
        return max((len(score.ours) for score in self.scores), default=0)


@dataclass(frozen=True)
class Table:
    """A table of the paper, or the numbers behind one of its figures.

    Attributes:
        key: "table2", "table3", "table4", "figure3" or "figure4".
        title: what it shows.
        name: heading of the rows' names.
        details: headings of what describes the rows.
        scores: headings of the numbers; the last one is what the table is about, as in the paper, where the accuracy
            on training images comes before that on test images and the baseline before the distilled network.
        rows: the lines.
        note: what a reader must know to read the numbers.
    """

    key: str
    title: str
    name: str
    details: tuple[str, ...]
    scores: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str

    def columns(self, number: int) -> tuple[str, ...]:
        """Headings below ``scores[number]``: without the paper's where it prints no number, as in its figures."""
        if any(row.scores[number].paper is not None for row in self.rows):
            return ("paper", "ours", "difference", "spread")
        return ("ours", "spread")

    def label(self, row: Row) -> str:
        """What tells a row from the others: its name, with the details where rows of that name had other runs."""
        if len({other.runs for other in self.rows if other.name == row.name}) < 2:
            return row.name
        shown = zip(self.details, map(show, row.details), strict=True)
        return ", ".join([row.name, *(f"{heading} {text}" for heading, text in shown if text)])

    def computations(self) -> list[tuple[str, tuple[RunRecord, ...]]]:
        """Labels of rows, and what computed them; rows that share their runs share an entry."""
        labels: dict[tuple[RunRecord, ...], list[str]] = {}
        for row in self.rows:
            labels.setdefault(row.runs, []).append(self.label(row))
        return [("; ".join(dict.fromkeys(names)), runs) for runs, names in labels.items() if runs]


@dataclass(frozen=True)
class Heatmap:
    """Where a network looked, over an image.

    Attributes:
        title: the name of the network.
        predicted: name of a class.
        probability: the probability of that class.
        jpeg: file of the drawing, relative to the output folder.
    """

    title: str
    predicted: str
    probability: float
    jpeg: str


@dataclass(frozen=True)
class Comparison:
    """The same image through the eyes of several networks (the paper's Figure 5).

    Attributes:
        image: path in the data set.
        truth: name of its class.
        jpeg: file of the plain image, relative to the output folder.
        heatmaps: one for each network.
    """

    image: str
    truth: str
    jpeg: str
    heatmaps: tuple[Heatmap, ...]


@dataclass(frozen=True)
class ReproductionResults:
    """Everything that the report shows.

    Attributes:
        data: the image folder.
        scale: "tiny" or "paper".
        split, images: what accuracies were measured on.
        seeds: the seeds of the trainings.
        tables: in the order of the paper.
        comparisons: Figure 5; empty if it was not asked for.
    """

    data: str
    scale: str
    split: str
    images: int
    seeds: tuple[int, ...]
    tables: tuple[Table, ...]
    comparisons: tuple[Comparison, ...] = ()

    def save(self, output: Path) -> None:
        """Write results.json, results.csv and results.md to ``output``.

        Raises:
            UserError: they cannot be written.
        """
        values = {"fpcn_dist_version": __version__, **dataclasses.asdict(self)}
        write_text(output / JSON, json.dumps(values, indent=2) + "\n")
        write_text(output / CSV, to_csv(self))
        write_text(output / MARKDOWN, to_markdown(self))


def show(value: str | float | None) -> str:
    """A detail as text: numbers with up to three digits after the point, thousands separated; "" for ``None``."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.3f}".rstrip("0").rstrip(".")


def percent(value: float | None) -> str:
    """A score as text; "-" for ``None``."""
    return "-" if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """A difference as text; "-" for ``None``."""
    return "-" if value is None else f"{value:+.1f}"


def cells(score: Score, columns: Iterable[str]) -> list[tuple[float | None, str]]:
    """Numbers under :meth:`Table.columns`, each with its text."""
    known = {
        "paper": (score.paper, percent(score.paper)),
        "ours": (score.mean, percent(score.mean)),
        "difference": (score.difference, signed(score.difference)),
        "spread": (score.spread, percent(score.spread)),
    }
    return [known[column] for column in columns]


_CSV_COLUMNS = (
    *("table", "name", "details", "score", "paper", "ours", "difference", "seeds", "spread", "values"),
    *("reason", "commits", "devices", "commands"),
)


def to_csv(results: ReproductionResults) -> str:
    """One line for each score of each row; several values in a cell are joined by "; "."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for table in results.tables:
        for row in table.rows:
            pairs = zip(table.details, row.details, strict=True)
            details = "; ".join(f"{heading}: {show(value)}" for heading, value in pairs if show(value))
            sources = [
                _joined(run.commit for run in row.runs),
                _joined(run.device for run in row.runs),
                _joined(run.command for run in row.runs),
            ]
            for heading, score in zip(table.scores, row.scores, strict=True):
                numbers = [score.paper, score.mean, score.difference, len(score.ours), score.spread]
                values = "; ".join(f"{value:.4g}" for value in score.ours)
                writer.writerow([table.key, row.name, details, heading, *numbers, values, row.reason, *sources])
    return buffer.getvalue()


def _joined(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def to_markdown(results: ReproductionResults) -> str:
    """Every table, and below it the commands of each row."""
    lines = [
        f"# {TITLE}",
        "",
        f"Data {_code(results.data)}, scale {markdown(results.scale)}, {len(results.seeds)} seed(s); accuracies on "
        f"{results.images:,} {markdown(results.split)} images, in percent. {CAVEAT}",
    ]
    for table in results.tables:
        columns = [table.columns(number) for number in range(len(table.scores))]
        heads = [table.name, *table.details]
        for heading, names in zip(table.scores, columns, strict=True):
            heads += [f"{heading}: {names[0]}", *names[1:]]
        lines += ["", f"## {markdown(table.title)}", "", _line([*heads, "seeds"]), _rule(1 + len(table.details), heads)]
        for row in table.rows:
            texts = [row.name, *map(show, row.details)]
            for score, names in zip(row.scores, columns, strict=True):
                texts += [text for _, text in cells(score, names)]
            lines.append(_line([*texts, str(row.seeds)]))
        lines += ["", markdown(table.note)]
        missing = [row for row in table.rows if row.reason]
        if missing:
            lines += ["", "Without a result, or not from every seed:", ""]
            lines += [f"- {markdown(table.label(row))}: {markdown(row.reason)}" for row in missing]
        computations = table.computations()
        if computations:
            lines += ["", "Commands:", ""]
        for label, runs in computations:
            lines += [
                f"- {markdown(label)}, seed {run.seed}: {_code(run.command)} "
                f"(commit {markdown(run.commit)}, {markdown(run.device)})"
                for run in runs
            ]
    return "\n".join(lines) + "\n"


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(map(markdown, texts)) + " |"


def _rule(left: int, heads: list[str]) -> str:
    """The line below the headings: numbers are aligned to the right, all but the first ``left`` columns."""
    return "| " + " | ".join(["---"] * left + ["---:"] * (len(heads) + 1 - left)) + " |"


def _code(text: str) -> str:
    """A code span, between more backticks than there are side by side in ``text``."""
    text = printable(" ".join(text.split()))
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"
