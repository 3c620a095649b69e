"""This module draws training curves as SVG for a page: text stays text, and colours are those of the page's theme."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curve = tuple[Sequence[float], Sequence[float]]

_MOST_POINTS = 300
# matplotlib wants colours; these are exchanged for the page's own, so that one drawing serves light, dark and paper.
_TEXT, _GRID = "#010203", "#010204"
SERIES = ("#0102a1", "#0102a2", "#0102a3", "#0102a4", "#0102a5")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fpcn",
    "font.size": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.edgecolor": _GRID,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def read_curves(metrics: Sequence[dict[str, Any]], kind: str, name: str) -> Curve:
    """Return epochs and finite values of ``name`` over the lines of one kind, "step" or "eval"."""
    points = [(line["epoch"], line[name]) for line in metrics if line["kind"] == kind and line.get(name) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def draw_curves(name: str, curves: dict[str, Curve], *, percent: bool = False) -> str:
    """Draw one chart over epochs as an ``<svg>`` element; empty curves are left out, and "" is returned if all are.

    Args:
        name: of the chart: lower-case letters, since it prefixes the ids inside.
        curves: label -> (epochs, values).
        percent: whether values are shares of 1 that read better as percent.
    """
    curves = {label: curve for label, curve in curves.items() if len(curve[0])}
    if not curves:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for (label, curve), colour in zip(curves.items(), SERIES, strict=False):
            epochs, values = _thin(curve)
            shown = 100 * values if percent else values
            marker = "o" if len(epochs) <= 30 else None
            axes.plot(epochs, shown, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel("%" if percent else "")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.grid(True, linewidth=0.6)
        axes.margins(x=0.02)
        axes.set_ylim(bottom=0)
        if len(curves) > 1:
            figure.legend(
                loc="outside upper left", ncols=4, frameon=False, handlelength=1.2, columnspacing=1.0, handletextpad=0.5
            )
        return to_svg(figure, name, ", ".join(curves))


def _thin(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Average over at most ``_MOST_POINTS`` stretches of equal length: a long run draws as fast as a short one."""
    epochs, values = (np.asarray(column, dtype=np.float64) for column in curve)
    starts = np.unique(np.linspace(0, len(epochs), _MOST_POINTS, endpoint=False).astype(int))
    lengths = np.diff([*starts, len(epochs)])
    return np.add.reduceat(epochs, starts) / lengths, np.add.reduceat(values, starts) / lengths


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Turn a figure into an ``<svg>`` element with the page's colours, ids that begin with ``name``, and a label."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Ids must be unique in the page, which holds several charts.
    text = re.sub(r'((?<![\w-])id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    view_box = text.partition('viewBox="')[2].partition('"')[0]
    text = f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(label)}">' + text[text.index(">") + 1 :]
    text = text.replace(_TEXT, "currentColor").replace(_GRID, "var(--line)")
    for number, colour in enumerate(SERIES, start=1):
        text = text.replace(colour, f"var(--series-{number})")
    return text
