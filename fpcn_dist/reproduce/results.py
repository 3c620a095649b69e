"""What came out of a reproduction: tables with the paper's numbers beside ours; results.json, .csv and .md."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fpcn_dist import __version__
from fpcn_dist.files import write_text

FILE, CSV, MARKDOWN = "results.json", "results.csv", "results.md"


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
        seed: of the training.
        command: what repeats it.
        commit: of fpcn-dist that computed it; its version where there was no checkout.
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
        name: of a system or a setting.
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


@dataclass(frozen=True)
class Table:
    """A table of the paper, or the numbers behind one of its figures.

    Attributes:
        key: "table2", "table3", "table4", "figure3" or "figure4".
        title: what it shows.
        name: heading of the rows' names.
        details, scores: headings of the other columns.
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


@dataclass(frozen=True)
class Heatmap:
    """Where a network looked, over an image.

    Attributes:
        title: of the network.
        predicted: name of a class.
        probability: of that class.
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
class Results:
    """Everything of the report.

    Attributes:
        data: the image folder.
        scale: "tiny" or "paper".
        split, images: what accuracies were measured on.
        seeds: of the trainings.
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
        write_text(output / FILE, json.dumps(values, indent=2) + "\n")
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


_CSV_COLUMNS = (
    "table", "name", "details", "score", "paper", "ours", "difference", "seeds", "spread", "values", "reason",
    "commits", "devices", "commands",
)  # fmt: skip


def to_csv(results: Results) -> str:
    """One line for each score of each row; several values in a cell are joined by "; "."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for table in results.tables:
        for row in table.rows:
            pairs = zip(table.details, row.details, strict=True)
            details = "; ".join(f"{heading}: {show(value)}" for heading, value in pairs if show(value))
            for heading, score in zip(table.scores, row.scores, strict=True):
                writer.writerow(
                    [
                        table.key, row.name, details, heading, score.paper, score.mean, score.difference,
                        len(score.ours), score.spread, "; ".join(f"{value:.4g}" for value in score.ours), row.reason,
                        _joined(run.commit for run in row.runs), _joined(run.device for run in row.runs),
                        _joined(run.command for run in row.runs),
                    ]
                )  # fmt: skip
    return buffer.getvalue()


def _joined(values: Iterator[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def to_markdown(results: Results) -> str:
    """Every table, and below it the command of each row."""
    lines = [
        "# The paper's tables on other data", "",
        f"Data `{results.data}`, scale {results.scale}, {len(results.seeds)} seed(s); accuracies on {results.images:,} "
        f"{results.split} images, in percent. The paper's numbers are for its own photographs, which are not public.",
    ]  # fmt: skip
    for table in results.tables:
        heads = [table.name, *table.details]
        for heading in table.scores:
            heads += [f"{heading}: paper", "ours", "difference", "spread"]
        lines += ["", f"## {table.title}", "", _line([*heads, "seeds"]), _line(["---"] * (len(heads) + 1))]
        for row in table.rows:
            cells = [row.name, *map(show, row.details)]
            for score in row.scores:
                cells += [percent(score.paper), percent(score.mean), signed(score.difference), percent(score.spread)]
            lines.append(_line([*cells, str(max((len(score.ours) for score in row.scores), default=0))]))
        lines += ["", table.note]
        lines += [
            f"- {row.name} has no result, or not from every seed: {row.reason}" for row in table.rows if row.reason
        ]
        lines += ["", "Commands:", ""]
        for run in dict.fromkeys(run for row in table.rows for run in row.runs):
            lines.append(f"- `{run.command}` (commit {run.commit}, {run.device})")
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "| " + " | ".join(escaped) + " |"
