"""Predictions as a record, a CSV file and a table of the terminal. Imports no torch."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_TABLE_ROWS = 40


@dataclass(frozen=True)
class Prediction:
    """What the model says about one file.

    Attributes:
        file: the file, as it was given or found in a given folder.
        predicted: the most probable class.
        probabilities: of every class, in label order; they sum to 1.
        object_share: share of the image inside the region that the model looked at.
    """

    file: str
    predicted: str
    probabilities: dict[str, float]
    object_share: float


def to_csv(predictions: Sequence[Prediction], classes: Sequence[str]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "predicted", *(f"probability {name}" for name in classes), "object_share"])
    for one in predictions:
        shown = (f"{one.probabilities[name]:.6f}" for name in classes)
        rows.writerow([one.file, one.predicted, *shown, f"{one.object_share:.4f}"])
    return text.getvalue()


def to_table(predictions: Sequence[Prediction]) -> Iterator[str]:
    """Lines: a head, the first predictions, and how often each class was found where not all are shown."""
    rows = [("file", "class", "probability", "runner-up")]
    for one in predictions[:_TABLE_ROWS]:
        ranked = sorted(one.probabilities.items(), key=lambda item: -item[1])
        runner_up = f"{ranked[1][0]} {100 * ranked[1][1]:.1f} %" if len(ranked) > 1 else ""
        rows.append((one.file, one.predicted, f"{100 * ranked[0][1]:.1f} %", runner_up))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for file, name, probability, runner_up in rows:
        line = f"{file:<{widths[0]}}  {name:<{widths[1]}}  {probability:>{widths[2]}}  {runner_up}"
        yield line.rstrip()
    if len(predictions) > _TABLE_ROWS:
        counts = Counter(one.predicted for one in predictions).most_common()
        found = ", ".join(f"{name} {number}" for name, number in counts)
        yield f"{_TABLE_ROWS} of {len(predictions)} files shown; in all: {found}"
