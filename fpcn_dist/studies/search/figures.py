"""Charts of a search as SVG. Trials that finished are filled marks, others hollow; accuracies are in percent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from fpcn_dist.runs.report.figures import SERIES, STYLE, to_svg
from fpcn_dist.studies.search.space import PAIRS

if TYPE_CHECKING:
    from fpcn_dist.studies.search.records import SearchResults, TrialRecord

_INK, _SOFT, _BEST = STYLE["text.color"], SERIES[4], SERIES[1]
# Names and values are the user's: a dollar sign in them is no mathematics.
_STYLE: dict[Any, Any] = STYLE | {"text.parse_math": False, "lines.markersize": 5.5, "lines.markeredgewidth": 1.2}
_WIDTH = 4.4
_SYMBOLS = {"contrast.center_weight": "lambda", "distill.temperature": "T"}
"""What the equations call a field."""


class _Point(NamedTuple):
    """A trial as it is drawn: its position and its kind."""

    trial: TrialRecord
    x: float
    y: float
    kind: str = "finished"


class _Look(NamedTuple):
    marker: str
    colour: str


_LOOKS = {
    "finished": _Look("o", SERIES[0]),
    "all": _Look("o", SERIES[0]),
    "random": _Look("s", SERIES[1]),
    "hardest": _Look("^", SERIES[2]),
    "shifts": _Look("D", SERIES[3]),
}
"""How each kind is drawn: a field has only one, the pairs of a batch have four."""


def bare(results: SearchResults, name: str) -> str:
    """A field as recipes name it: stage joint says in front whose it is."""
    return name.removeprefix("teacher.").removeprefix("student.") if results.stage == "joint" else name


def label_of(results: SearchResults, name: str) -> str:
    """A field with its symbol, where the equations have one."""
    symbol = _SYMBOLS.get(bare(results, name))
    return f"{symbol} ({name})" if symbol else name


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_value(value: Any) -> str:
    """A setting as a recipe writes it, to four digits."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def scored(results: SearchResults) -> list[TrialRecord]:
    """Trials to draw: those with an accuracy that have not failed."""
    return [trial for trial in results.trials if trial.accuracy is not None and trial.state != "failed"]


def draw_pairs(results: SearchResults, chart: str) -> str:
    """Accuracy against the pairs of a batch, "" where no trial contrasts any.

    Args:
        results: the results of the search.
        chart: prefix of the ids inside; begins with a lower-case letter.
    """
    field = next((name for name in results.fields if bare(results, name) == PAIRS), PAIRS)
    points = [
        _Point(trial, trial.pairs, _percent(trial), str(trial.settings.get(field, "finished")))
        for trial in scored(results)
        if trial.pairs
    ]
    return _draw_against(results, points, "pairs per batch", chart, log=True)


def draw_numbers(results: SearchResults, name: str, chart: str) -> str:
    """Accuracy against a field of numbers; an exact 0 has a place of its own left of a logarithmic axis."""
    trials = [trial for trial in scored(results) if name in trial.settings]
    points = [_Point(trial, trial.settings[name], _percent(trial)) for trial in trials]
    return _draw_against(results, points, label_of(results, name), chart, log=name in results.log_fields)


def draw_choices(results: SearchResults, name: str, chart: str) -> str:
    """Accuracy of every trial in a row for each value of a field, the first value on top."""
    trials = [trial for trial in scored(results) if name in trial.settings]
    rows = list(dict.fromkeys(write_value(trial.settings[name]) for trial in trials))
    if not rows:
        return ""
    points = []
    for place, trial in enumerate(trials):
        # Multiples of the golden ratio spread evenly however many there are.
        spread = 0.5 * (0.618034 * place % 1 - 0.5)
        points.append(_Point(trial, _percent(trial), rows.index(write_value(trial.settings[name])) + spread))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.1 + 0.45 * max(2, len(rows))), layout="constrained")
        axes = figure.add_subplot()
        _mark(axes, points, results.best)
        axes.set_xlabel("accuracy, %")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [_shorten(row, 20) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.grid(True, axis="x", linewidth=0.6)
        _write_legend(figure, points, results.best)
        return to_svg(figure, chart, f"accuracy by {name}")


def draw_importance(results: SearchResults, chart: str) -> str:
    """A bar for each field, longest first, under its name."""
    shares = sorted(results.importance.items(), key=lambda entry: -entry[1])
    if not shares:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.2 + 0.48 * len(shares)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(shares))
        bars = axes.barh(places, [share for _, share in shares], height=0.34, color=SERIES[0])
        axes.bar_label(bars, [f"{100 * share:.0f} %" for _, share in shares], padding=4)
        for place, (name, _) in zip(places, shares, strict=True):
            axes.text(0, place - 0.28, _shorten(label_of(results, name), 48), va="bottom")
        axes.set_ylim(len(shares) - 0.7, -0.95)
        axes.set_xlim(0, 1.16 * max(share for _, share in shares) or 1)
        axes.set_axis_off()
        return to_svg(figure, chart, "importance of " + ", ".join(name for name, _ in shares))


def draw_progress(results: SearchResults, chart: str) -> str:
    """The best accuracy so far against epochs, a line for each trial."""
    looks = {"stopped": (_SOFT, "x"), "running": (SERIES[2], "."), "finished": (SERIES[0], "."), "best": (_BEST, "o")}
    names = {"stopped": "stopped early", "best": "best trial"}
    kinds = [("best" if trial is results.best else trial.state, trial) for trial in scored(results)]
    if not kinds:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        handles = []
        for order, (kind, (colour, marker)) in enumerate(looks.items()):
            trials = [trial for name, trial in kinds if name == kind]
            width = 2.6 if kind == "best" else 1.0 if len(kinds) <= 50 else 0.6
            for trial in trials:
                epochs, shares = zip(*trial.history, strict=True)
                axes.plot(
                    epochs,
                    [100 * share for share in shares],
                    color=colour,
                    linewidth=width,
                    zorder=2 + 0.1 * order,
                    drawstyle="steps-post",
                )
                axes.plot(epochs[-1], 100 * shares[-1], marker, color=colour, zorder=3)
            if trials:
                look = {"color": colour, "linewidth": width, "marker": marker}
                handles.append(Line2D([], [], label=names.get(kind, kind), **look))
        axes.set_xlabel("epoch")
        axes.set_ylabel("accuracy, %")
        axes.set_xlim(0, 1.03 * max(results.epochs, *(trial.epoch or 0 for _, trial in kinds)))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.grid(True, linewidth=0.6)
        _legend(figure, handles)
        return to_svg(figure, chart, "accuracy against epochs of every trial")


def draw_pareto(results: SearchResults, chart: str) -> str:
    """Draw accuracy against milliseconds; a line joins the trials of the front, which have their numbers on."""
    front = results.pareto
    points = [_Point(trial, trial.latency, _percent(trial)) for trial in scored(results) if trial.latency]
    if not points:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        line = Line2D([], [], color=_BEST, linewidth=1.6, label="Pareto front")
        axes.plot([trial.latency or 0 for trial in front], [_percent(trial) for trial in front], color=_BEST)
        _mark(axes, points, results.best)
        _finish(axes, points, "ms of one image", log=True)
        axes.margins(x=0.1, y=0.14)  # room for the numbers
        _write_legend(figure, points, results.best, *([line] if front else []))
        figure.draw_without_rendering()  # fixes all positions in pixels
        taken: list[Bbox] = []
        for trial in front:
            # Nothing that finished lies left of and above the front.
            label = axes.annotate(
                str(trial.number),
                (trial.latency or 0, _percent(trial)),
                (-5, 5),
                textcoords="offset points",
                ha="right",
                va="bottom",
            )
            label.set_in_layout(False)
            box = label.get_window_extent()
            if any(box.overlaps(other) for other in taken):
                label.remove()
            else:
                taken.append(box)
        return to_svg(figure, chart, "accuracy against latency")


def _draw_against(results: SearchResults, points: Sequence[_Point], label: str, chart: str, *, log: bool) -> str:
    if not points:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.0), layout="constrained")
        axes = figure.add_subplot()
        _mark(axes, points, results.best)
        _finish(axes, points, label, log=log)
        _write_legend(figure, points, results.best)
        return to_svg(figure, chart, f"accuracy against {label}")


def _mark(axes: Axes, points: Sequence[_Point], best: TrialRecord | None) -> None:
    """Draw the trials as points: those that finished lie on top, and the best one has a ring."""
    for point in sorted(points, key=lambda point: point.trial.state == "finished"):
        look = _LOOKS.get(point.kind, _LOOKS["finished"])
        face = look.colour if point.trial.state == "finished" else "none"
        axes.plot(point.x, point.y, look.marker, color=look.colour, markerfacecolor=face, clip_on=False, zorder=3)
        if point.trial is best:
            axes.plot(point.x, point.y, "o", color=_INK, markerfacecolor="none", markersize=11, clip_on=False, zorder=4)


def _write_legend(figure: Figure, points: Sequence[_Point], best: TrialRecord | None, *more: Line2D) -> None:
    present, states = {point.kind for point in points}, {point.trial.state for point in points}
    handles = [
        Line2D([], [], linestyle="none", marker=look.marker, color=look.colour, label=kind)
        for kind, look in _LOOKS.items()
        if kind in present and (kind != "finished" or "finished" in states)
    ]
    words = {"stopped": "stopped early", "running": "running"}
    if hollow := " or ".join(word for state, word in words.items() if state in states):
        handles.append(Line2D([], [], linestyle="none", marker="o", color=_SOFT, markerfacecolor="none", label=hollow))
    if any(point.trial is best for point in points):
        ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none"}
        handles.append(Line2D([], [], linestyle="none", color=_INK, label="best trial", **ring))
    _legend(figure, [*handles, *more])


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=3,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.0,
        handletextpad=0.5,
    )


def _finish(axes: Axes, points: Sequence[_Point], label: str, *, log: bool) -> None:
    """Scales, ticks and names of the axes of accuracy against something."""
    values = [point.x for point in points]
    axes.set_xlabel(_shorten(label, 48))
    axes.set_ylabel("accuracy, %")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(True, linewidth=0.6)
    positive = [value for value in values if value > 0]
    if not log or not positive:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        return
    least, most = min(positive), max(positive)
    beside = sorted({value for value in values if value <= 0})
    if beside:
        # Logarithmic from the least value on; 0 stands a part of the axis apart from it.
        axes.set_xscale("symlog", linthresh=least, linscale=max(0.4, 0.16 * math.log10(most / least)))
        axes.axvline(least / 2, color=_SOFT, linewidth=1, linestyle=(0, (3, 3)))
    else:
        axes.set_xscale("log")
        least, most = axes.get_xlim()
    axes.set_xticks([*beside, *_log_ticks(least, most)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _log_ticks(least: float, most: float) -> list[float]:
    """Some round numbers of a logarithmic axis, few enough for their names to stand side by side."""
    decades = math.log10(most / least)
    if not decades:
        return [least]
    if decades < 0.5:
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(least, most)
    else:
        digits = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
        every = max(1, math.ceil(decades / 6))
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        ticks = [digit * 10.0**power for power in powers if power % every == 0 for digit in digits]
    return [tick for tick in ticks if 0.999 * least <= tick <= 1.001 * most] or [least]


def _percent(trial: TrialRecord) -> float:
    return 100 * (trial.accuracy or 0.0)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
