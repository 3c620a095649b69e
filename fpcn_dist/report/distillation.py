"""The report of a distillation: one HTML file that shows what each student costs and how well it classifies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from fpcn_dist import __version__
from fpcn_dist.files import write_text
from fpcn_dist.report.build import FILE
from fpcn_dist.report.figures import _SERIES, _STYLE, _to_svg

if TYPE_CHECKING:
    from fpcn_dist.distill.table import Results

_DISTILLED, _TEACHER, _BASELINE = _SERIES[0], _SERIES[1], _SERIES[4]


def build_distillation_report(output: Path, results: Results) -> Path:
    """Write ``output``/report.html, which needs no other file to be read but links those of the runs.

    Raises:
        UserError: it cannot be written.
    """
    templates = Environment(
        loader=PackageLoader("fpcn_dist.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    reports = [name for row in results.students for name in (row.name, f"{row.name}-baseline")]
    html = templates.get_template("distillation.html.j2").render(
        title=output.resolve().name,
        subtitle=f"{len(results.students)} students of {results.teacher.folder}",
        tiles=_tiles(results),
        results=results,
        # Markup: the SVG comes from matplotlib, which escapes its labels.
        plot=Markup(draw_accuracy_against_cost(results)),
        links={name: quote(f"{name}/{FILE}") for name in reports if (output / name / FILE).is_file()},
        version=__version__,
    )
    write_text(output / FILE, html)
    return output / FILE


def _tiles(results: Results) -> list[dict[str, str]]:
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


def draw_accuracy_against_cost(results: Results) -> str:
    """Accuracy in percent over GFLOPs as an ``<svg>`` element, "" where no student has a result.

    A line joins what a student reached without the teacher and with it.
    """
    rows = [row for row in results.students if row.cost is not None]
    if not rows:
        return ""
    named: list[tuple[float, float, str]] = []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for row in rows:
            assert row.cost is not None
            cost = row.cost.flops / 1e9
            found = [
                (100 * score.accuracy, colour, face)
                for score, colour, face in ((row.baseline, _BASELINE, "none"), (row.distilled, _DISTILLED, _DISTILLED))
                if score is not None
            ]
            axes.plot([cost] * len(found), [accuracy for accuracy, _, _ in found], color=_BASELINE, linewidth=1)
            for accuracy, colour, face in found:
                axes.plot(cost, accuracy, "o", color=colour, markerfacecolor=face, markersize=6, clip_on=False)
            named.append((cost, found[-1][0], row.name))
        teacher = results.teacher
        if teacher.evaluation is not None:
            cost, accuracy = teacher.cost.flops / 1e9, 100 * teacher.evaluation.accuracy
            axes.plot(cost, accuracy, "D", color=_TEACHER, markersize=6, clip_on=False)
            named.append((cost, accuracy, "teacher"))
        for marker, colour, face, label in (
            ("o", _DISTILLED, _DISTILLED, "distilled"),
            ("o", _BASELINE, "none", "baseline"),
            ("D", _TEACHER, _TEACHER, "teacher"),
        ):
            shown = {"baseline": results.baselines, "teacher": teacher.evaluation is not None}.get(label, True)
            if shown:
                axes.plot([], [], marker, color=colour, markerfacecolor=face, markersize=6, label=label)
        _scale(axes)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.3, columnspacing=1.0)
        _name_points(figure, axes, named)
        return _to_svg(figure, "cost", "accuracy over GFLOPs of " + ", ".join(name for _, _, name in named))


def _scale(axes: Axes) -> None:
    axes.set_xlabel("GFLOPs of one image")
    axes.set_ylabel("accuracy, %")
    axes.margins(x=0.2, y=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low), min(high, 100) if high > low else None)
    axes.grid(True, linewidth=0.6)


def _name_points(figure: Figure, axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Write each name beside its point, on the side where it covers least of what is there already."""
    figure.draw_without_rendering()  # lays out; positions in pixels are known from here on
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform([p[:2] for p in points])]
    for cost, accuracy, name in sorted(points, key=lambda point: (-point[1], point[0])):
        best: tuple[float, Bbox, dict] | None = None
        for dx, dy, horizontal, vertical in (
            (7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 7, "center", "bottom"), (0, -7, "center", "top"),
            (6, 8, "left", "bottom"), (6, -8, "left", "top"), (-6, 8, "right", "bottom"), (-6, -8, "right", "top"),
        ):  # fmt: skip
            options = {"xytext": (dx, dy), "ha": horizontal, "va": vertical}
            label = axes.annotate(name, (cost, accuracy), textcoords="offset points", fontsize=9, **options)
            box = label.get_window_extent()
            label.remove()
            inside = Bbox.intersection(box, figure.bbox)
            hidden = box.width * box.height - (inside.width * inside.height if inside else 0)
            overlaps = [Bbox.intersection(box, other) for other in taken]
            hidden += sum(overlap.width * overlap.height for overlap in overlaps if overlap)
            if best is None or hidden < best[0]:
                best = hidden, box, options
        assert best is not None
        taken.append(best[1])
        label = axes.annotate(
            name, (cost, accuracy), textcoords="offset points", fontsize=9, parse_math=False, **best[2]
        )
        label.set_in_layout(False)
