"""Predictions as a record, two files and a table of the terminal, whatever computed them.

Needs the standard library alone, because ONNX models are run on machines that have little else.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fpcn_dist.runtime.files import write_text
from fpcn_dist.runtime.names import printable

_TABLE_ROWS = 40


@dataclass(frozen=True)
class Prediction:
    """What the model says about one file.

    Attributes:
        file: the file, as it was given or found in a given folder.
        predicted: the most probable class.
        probabilities: of every class, in label order; they sum to 1.
        object_share: share of the image inside the region that the model looked at.
        overlay: name of the drawing of that region in overlays/; ``None`` where none is drawn.
    """

    file: str
    predicted: str
    probabilities: dict[str, float]
    object_share: float
    overlay: str | None = None


def write_predictions(output: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions.json and predictions.csv to a folder; they name overlays where there are any.

    Raises:
        UserError: the folder cannot be written to.
    """
    records = [asdict(one) for one in predictions]
    if all(one.overlay is None for one in predictions):
        for record in records:
            del record["overlay"]
    write_text(output / "predictions.json", json.dumps(records, indent=2))
    write_text(output / "predictions.csv", _to_csv(predictions))


def _to_csv(predictions: Sequence[Prediction]) -> str:
    overlays = any(one.overlay is not None for one in predictions)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    probabilities = [f"probability {name}" for name in predictions[0].probabilities]
    rows.writerow(["file", "predicted", *probabilities, "object_share", *["overlay"] * overlays])
    for one in predictions:
        shown = (f"{probability:.6f}" for probability in one.probabilities.values())
        rows.writerow([one.file, one.predicted, *shown, f"{one.object_share:.4f}", *[one.overlay] * overlays])
    return text.getvalue()


def to_table(predictions: Sequence[Prediction]) -> Iterator[str]:
    """Give lines: a head, the first predictions, and how often each class was found where not all are shown."""
    rows = [("file", "class", "probability", "runner-up")]
    for one in predictions[:_TABLE_ROWS]:
        ranked = sorted(one.probabilities.items(), key=lambda item: -item[1])
        runner_up = f"{printable(ranked[1][0])} {100 * ranked[1][1]:.1f} %" if len(ranked) > 1 else ""
        rows.append((printable(one.file), printable(one.predicted), f"{100 * ranked[0][1]:.1f} %", runner_up))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for file, name, probability, runner_up in rows:
        line = f"{file:<{widths[0]}}  {name:<{widths[1]}}  {probability:>{widths[2]}}  {runner_up}"
        yield line.rstrip()
    if len(predictions) > _TABLE_ROWS:
        counts = Counter(one.predicted for one in predictions).most_common()
        found = ", ".join(f"{printable(name)} {number}" for name, number in counts)
        yield f"{_TABLE_ROWS} of {len(predictions)} files shown; in all: {found}"
