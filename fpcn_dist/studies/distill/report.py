"""The report of a distillation: one HTML file that shows what each student costs and how well it classifies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from fpcn_dist.runs.report.figures import SERIES, STYLE, to_svg
from fpcn_dist.runs.report.page import REPORT_FILE, write_page

if TYPE_CHECKING:
    from fpcn_dist.studies.distill.results import DistillationResults

_DISTILLED, _TEACHER, _BASELINE = SERIES[0], SERIES[1], SERIES[4]

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def build_distillation_report(output: Path, results: DistillationResults) -> Path:
    """Write ``output``/report.html, which needs no other file to be read but links those of the runs.

    Raises:
        UserError: it cannot be written.
    """
    reports = [name for row in results.students for name in row.runs]
    return write_page(
        output,
        _TEMPLATE,
        title=output.resolve().name,
        subtitle=f"{len(results.students)} students of {results.teacher.folder}",
        tiles=_tiles(results),
        results=results,
        # Markup: the SVG comes from matplotlib, which escapes its labels.
        plot=Markup(draw_accuracy_against_cost(results)),
        links={name: quote(f"{name}/{REPORT_FILE}") for name in reports if (output / name / REPORT_FILE).is_file()},
    )


def _tiles(results: DistillationResults) -> list[dict[str, str]]:
    """The headline: name, value and a note of each number that there is."""
    teacher, tiles = results.teacher, []
    if teacher.evaluation is not None:
        note = f"{teacher.backbone}, {teacher.cost.flops / 1e9:.3g} GFLOPs"
        tiles.append({"name": "teacher", "value": f"{100 * teacher.evaluation.accuracy:.1f} %", "note": note})
    scored = [
        (row.distilled.accuracy, row.cost.flops, row.name) for row in results.students if row.distilled and row.cost
    ]
    if scored:
        accuracy, flops, name = max(scored, key=lambda entry: (entry[0], -entry[1]))
        note = f"{name}, {flops / 1e9:.3g} GFLOPs"
        tiles.append({"name": "best student", "value": f"{100 * accuracy:.1f} %", "note": note})
        accuracy, flops, name = min(scored, key=lambda entry: (entry[1], -entry[0]))
        note = f"{name}, {teacher.cost.flops / flops:.3g} times less than the teacher"
        tiles.append({"name": "least work", "value": f"{flops / 1e9:.3g} GFLOPs", "note": note})
    gains = [row.gain for row in results.students if row.gain is not None]
    if gains:
        note = f"mean of {len(gains)} students"
        tiles.append({"name": "gain by the teacher", "value": f"{sum(gains) / len(gains):+.1f} points", "note": note})
    trained = sum(row.distilled is not None for row in results.students)
    tiles.append({"name": "students", "value": f"{trained} of {len(results.students)}", "note": "have a result"})
    return tiles


def draw_accuracy_against_cost(results: DistillationResults) -> str:
    """Accuracy in percent over GFLOPs as an ``<svg>`` element, "" where no student has a result.

    A line joins what a student reached without the teacher and with it.
    """
    kinds = [_Kind("distilled", "o", _DISTILLED, _DISTILLED)]
    points: list[_Point] = []
    for row in results.students:
        if row.cost is not None:
            scores = [score.accuracy for score in (row.distilled, row.baseline) if score is not None]
            points.append(_Point(row.name, row.cost.flops / 1e9, 100 * scores[0], 100 * scores[-1]))
    if not points:
        return ""
    teacher = results.teacher
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            axes.plot([point.cost] * 2, [point.accuracy, point.other], color=_BASELINE, linewidth=1)
        if results.baselines:
            kinds.append(_Kind("baseline", "o", _BASELINE, "none"))
        if teacher.evaluation is not None:
            kinds.append(_Kind("teacher", "D", _TEACHER, _TEACHER))
            accuracy = 100 * teacher.evaluation.accuracy
            points.append(_Point("teacher", teacher.cost.flops / 1e9, accuracy, accuracy))
        for kind in kinds:
            where = _marked(results, kind.label)
            axes.plot(
                [cost for cost, _ in where],
                [accuracy for _, accuracy in where],
                kind.marker,
                color=kind.colour,
                markerfacecolor=kind.face,
                markersize=6,
                clip_on=False,
                label=kind.label,
            )
        _scale(axes)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.3, columnspacing=1.0)
        _write_names(figure, axes, points)
        return to_svg(figure, "cost", "accuracy over GFLOPs of " + ", ".join(point.name for point in points))


class _Kind(NamedTuple):
    """How one kind of result is drawn."""

    label: str
    marker: str
    colour: str
    face: str


class _Point(NamedTuple):
    """Where a name is written, and where the line from there ends."""

    name: str
    cost: float
    accuracy: float
    other: float


def _marked(results: DistillationResults, kind: str) -> list[tuple[float, float]]:
    """GFLOPs and accuracies in percent of the results of one kind."""
    if kind == "teacher":
        entries = [(results.teacher.cost, results.teacher.evaluation)]
    else:
        entries = [(row.cost, getattr(row, kind)) for row in results.students]
    return [(cost.flops / 1e9, 100 * score.accuracy) for cost, score in entries if cost and score]


def _scale(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("GFLOPs of one image")
    axes.set_ylabel("accuracy, %")
    axes.margins(x=0.22, y=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low), min(100, high))
    axes.grid(True, linewidth=0.6)


_PLACES = (
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
    (5, 5, "left", "bottom"),
    (5, -5, "left", "top"),
    (-5, 5, "right", "bottom"),
    (-5, -5, "right", "top"),
)
"""Where a name may stand beside its point: an offset in typographic points, and the alignment."""


def _write_names(figure: Figure, axes: Axes, points: Sequence[_Point]) -> None:
    """Write each name beside its point, where it covers least of what is there already."""
    figure.draw_without_rendering()  # fixes where the axes are, hence all positions in pixels
    taken = [box for point in points for box in _boxes(axes, point)]
    for point in sorted(points, key=lambda point: (-point.accuracy, point.cost)):
        covered: list[tuple[float, int, Annotation]] = []
        for number, (dx, dy, horizontal, vertical) in enumerate(_PLACES):
            label = axes.annotate(
                point.name,
                (point.cost, point.accuracy),
                (dx, dy),
                textcoords="offset points",
                fontsize=8.5,
                ha=horizontal,
                va=vertical,
                parse_math=False,
            )
            label.set_in_layout(False)
            box = label.get_window_extent()
            outside = _area(box) - _area(Bbox.intersection(box, axes.bbox))
            covered.append((outside + sum(_area(Bbox.intersection(box, other)) for other in taken), number, label))
        best = min(covered)[2]
        taken.append(best.get_window_extent())
        for _, _, label in covered:
            if label is not best:
                label.remove()


def _boxes(axes: Axes, point: _Point) -> list[Bbox]:
    """Pixels that both markers of a point and the line between them cover."""
    ends = axes.transData.transform([(point.cost, point.accuracy), (point.cost, point.other)])
    markers = [Bbox([end - 6, end + 6]) for end in ends]
    return [*markers, Bbox([ends.min(axis=0) - (1, 0), ends.max(axis=0) + (1, 0)])]


def _area(box: Bbox | None) -> float:
    return box.width * box.height if box is not None else 0.0
