"""Charts of a reproduction as SVG: the paper's Figures 3 and 4, and its accuracies beside ours. All are in percent."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fpcn_dist.runs.report.figures import SERIES, STYLE, to_svg
from fpcn_dist.studies.reproduce.tables import Row, Score, Table

# Names are the user's: a dollar sign in them is no mathematics.
_STYLE: dict[Any, Any] = STYLE | {"text.parse_math": False}
_WIDTH = 4.4
_MARKERS = ("o", "s", "^", "D", "v")
_PAPER, _OURS = SERIES[4], SERIES[0]


def draw(table: Table) -> str:
    """The chart of a table as an ``<svg>`` element, "" where it has none or there is nothing to draw.

    Figure 3 is drawn over its pairs, Figure 4 over its areas, and Tables 2 and 4 as the paper's numbers beside ours.
    """
    if table.key == "figure3":
        return draw_pairs(table)
    if table.key == "figure4":
        return draw_areas(table)
    return draw_beside(table) if table.key in ("table2", "table4") else ""


def draw_pairs(table: Table) -> str:
    """A line for each system over the pairs of images in a batch, on a logarithmic axis."""
    rows = [row for row in table.rows if _score(row).mean is not None and _pairs(row) > 0]
    systems = list(dict.fromkeys(row.name for row in rows))
    if not systems:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for number, system in enumerate(systems):
            points = [(_pairs(row), row) for row in sorted(rows, key=_pairs) if row.name == system]
            _draw_series(axes, number, system, points, line=True)
        axes.set_xscale("log")
        axes.set_xlabel(table.details[0])
        axes.margins(x=0.08)
        axes.set_xticks(_apart({_pairs(row) for row in rows}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _finish(axes, table)
        _legend(figure, axes)
        return to_svg(figure, "pairs", f"{table.scores[-1]} over {table.details[0]} of " + ", ".join(systems))


def draw_areas(table: Table) -> str:
    """A mark for each system and share of the image that the object covers; shares without images are left out."""
    rows = [row for row in table.rows if _score(row).mean is not None and row.details[0] is not None]
    systems = list(dict.fromkeys(row.name for row in rows))
    there = {row.details[0] for row in rows}
    areas = [area for area in dict.fromkeys(row.details[0] for row in table.rows) if area in there]
    if not systems:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for number, system in enumerate(systems):
            offset = 0.24 * (number - (len(systems) - 1) / 2)
            points = [(areas.index(row.details[0]) + offset, row) for row in rows if row.name == system]
            _draw_series(axes, number, system, points, line=False)
        axes.set_xticks(range(len(areas)), [f"{area}\n{_images(rows, area)}" for area in areas])
        axes.tick_params(axis="x", length=0, labelsize=9)
        axes.set_xlim(-0.5, len(areas) - 0.5)
        axes.set_xlabel(f"{table.details[0]}, and {table.details[1]}")
        _finish(axes, table)
        axes.grid(False, axis="x")
        _legend(figure, axes)
        return to_svg(figure, "areas", f"{table.scores[-1]} by {table.details[0]}, " + ", ".join(systems))


def draw_beside(table: Table) -> str:
    """A line for each row, from the paper's number to ours; ours with its spread over seeds."""
    rows = [row for row in table.rows if _score(row).mean is not None]
    if not rows:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.27 * max(2, len(rows))), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            score, ours = _score(row), _mean(row)
            if score.paper is not None:
                axes.plot([score.paper, ours], [place, place], color=_PAPER, linewidth=1)
                axes.plot(score.paper, place, "D", color=_PAPER, markerfacecolor="none", markersize=5.5)
            spread = score.spread or math.nan
            axes.errorbar([ours], [place], xerr=[spread], fmt="o", color=_OURS, markersize=6, capsize=3)
        handles = [Line2D([], [], linestyle="none", marker="o", color=_OURS, label="ours")]
        if any(_score(row).paper is not None for row in rows):
            look = {"marker": "D", "markersize": 5.5, "markerfacecolor": "none"}
            handles.append(Line2D([], [], linestyle="none", color=_PAPER, label="paper, other photographs", **look))
        axes.set_yticks(range(len(rows)), [_shorten(table.label(row), 24) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(_shorten(table.scores[-1], 48))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.grid(True, linewidth=0.6)
        figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, handletextpad=0.3)
        return to_svg(figure, table.key, f"{table.scores[-1]}: ours and the paper's")


def _draw_series(axes: Axes, number: int, name: str, points: list[tuple[float, Row]], *, line: bool) -> None:
    """Means over x, with the spread over seeds where there are several."""
    axes.errorbar(
        [x for x, _ in points],
        [_mean(row) for _, row in points],
        yerr=[_score(row).spread or math.nan for _, row in points],
        color=SERIES[number % len(SERIES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=6,
        linestyle="-" if line else "none",
        linewidth=1.6,
        elinewidth=1.2,
        capsize=3,
        label=_shorten(name, 24),
    )


def _finish(axes: Axes, table: Table) -> None:
    axes.set_ylabel(_shorten(table.scores[-1], 32))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(True, linewidth=0.6)


def _legend(figure: Figure, axes: Axes) -> None:
    # Marks alone: the bars of the spread would be drawn through them.
    handles = [bars.lines[0] for bars in axes.containers if isinstance(bars, ErrorbarContainer)]
    labels = axes.get_legend_handles_labels()[1]
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=3,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _apart(values: set[float]) -> list[float]:
    """The positive numbers whose texts have room beside each other on a logarithmic axis."""
    kept: list[float] = []
    room = 0.11 * math.log(max(values) / min(values))
    for value in sorted(values):
        if not kept or math.log(value / kept[-1]) >= room:
            kept.append(value)
    return kept


def _images(rows: list[Row], area: str | float | None) -> str:
    """How many images have a share; systems that find other objects have other numbers of them."""
    counts = [row.details[1] for row in rows if row.details[0] == area]
    return " / ".join(dict.fromkeys(f"{count:,.0f}" for count in counts if isinstance(count, int | float)))


def _score(row: Row) -> Score:
    """What the table is about."""
    return row.scores[-1]


def _mean(row: Row) -> float:
    """Ours, of a row that is drawn."""
    mean = _score(row).mean
    return math.nan if mean is None else mean


def _pairs(row: Row) -> float:
    pairs = row.details[0]
    return float(pairs) if isinstance(pairs, int | float) else 0.0


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
