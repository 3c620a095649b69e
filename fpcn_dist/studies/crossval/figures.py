"""A figure for each question: accuracies of its rows, one point a network, with the spread of the seeds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fpcn_dist.studies.crossval.questions import Question
from fpcn_dist.studies.crossval.results import Answer

_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fpcn", "font.size": 10, "text.parse_math": False}
_COLOURS = ("#1b6ca8", "#c2571a", "#3c7d3c", "#8d4a9e")
_MARKERS = ("o", "s", "^", "D")
_ROW, _MARGIN = 0.3, 1.1  # inches


def draw(question: Question, answers: Mapping[str, Sequence[Answer]]) -> str:
    """The figure of a question as an SVG document.

    Args:
        question: whose title it has.
        answers: by network, with the same rows in the same order.
    """
    names = [answer.outcome.name for answer in next(iter(answers.values()))]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, _ROW * len(names) + _MARGIN), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        for number, (network, rows) in enumerate(answers.items()):
            means = [100 * answer.outcome.mean("accuracy") for answer in rows]
            spreads = [100 * (answer.outcome.spread("accuracy") or 0.0) for answer in rows]
            shift = 0.18 * (number - (len(answers) - 1) / 2)
            places = [place + shift for place in range(len(rows))]
            style = {"fmt": _MARKERS[number % 4], "color": _COLOURS[number % 4], "markersize": 5, "linewidth": 1.2}
            axes.errorbar(means, places, xerr=spreads, label=network, **style)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("accuracy over all test folds, %")
        axes.grid(True, axis="x", linewidth=0.5, color="#cccccc")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper right", ncols=len(answers), frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Title": question.title})
    return text.getvalue()
