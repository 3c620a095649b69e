"""What the trainings of a study reached, and how its rows compare.

Legend: S seeds, N tested photographs, K classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.studies.crossval.cells import Cell
from fpcn_dist.studies.crossval.parts import Parts
from fpcn_dist.studies.crossval.questions import OWN, Question, Row
from fpcn_dist.studies.crossval.statistics import Difference, Scores, difference, scores


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a row reached with one network, read in one way.

    Attributes:
        network: the backbone.
        row: what was trained.
        reading: how photographs were classified.
        rate: learning rate of the head.
        scores: of each seed over all tested photographs.
        seconds: mean CPU time of a training.
        departure: mean distance of the gates X_f of single images from 1; ``None`` where nothing is multiplied by them.
        probabilities_SNK: of the tested photographs.
    """

    network: str
    row: Row
    reading: str
    rate: float
    scores: tuple[Scores, ...]
    seconds: float
    departure: float | None
    probabilities_SNK: NDArray[np.float32]

    @property
    def name(self) -> str:
        """Of the row, and of the reading where it is not the usual one."""
        return self.row.name if self.reading == OWN else f"{self.row.name}, read by {self.reading}"

    def mean(self, score: str) -> float:
        """Of a score over the seeds."""
        return float(np.mean([getattr(own, score) for own in self.scores]))

    def spread(self, score: str) -> float | None:
        """Standard deviation of a score over the seeds; ``None`` for one seed."""
        values = [getattr(own, score) for own in self.scores]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A row of a question's table: the outcome, and its difference from that of the reference row, if it is another."""

    outcome: Outcome
    reference: str | None
    difference: Difference | None


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """All outcomes, and for each question the rows of its table by network.

    Attributes:
        outcomes: each once.
        answers: of each question, by network.
        tested, groups, validation: photographs in the folds, groups of near-duplicates among all, and photographs to
            choose by.
        folds, steps: of the study.
    """

    outcomes: tuple[Outcome, ...]
    answers: tuple[tuple[Question, dict[str, tuple[Answer, ...]]], ...]
    tested: int
    groups: int
    validation: int
    folds: int
    steps: int


def best_rate(cells: Sequence[Cell], labels: NDArray[np.int64]) -> float:
    """The rate whose training is best on the validation photographs, by accuracy and then by log loss.

    Args:
        cells: trainings that differ in their rate alone.
        labels: of the validation photographs.
    """

    def quality(cell: Cell) -> tuple[float, float]:
        with safe_open(cell.path, "np") as file:
            found = scores(file.get_tensor(f"{OWN}, validation"), labels)
        return found.accuracy, -found.log_loss

    return max(cells, key=quality).rate


def collect(
    trained: Mapping[str, Mapping[str, Sequence[Cell]]],
    chosen: Sequence[Question],
    manifest: Manifest,
    parts: Parts,
    steps: int,
) -> StudyResults:
    """Read all cells and compare the rows of each question.

    Args:
        trained: of each network, the cells of each row by its name.
        chosen: the questions.
        manifest: the photographs.
        parts: their folds.
        steps: updates of a training.
    """
    labels, groups = manifest.labels[parts.tested], parts.group_N[parts.tested]
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for network, rows in trained.items():
        for name, cells in rows.items():
            outcomes[network, name] = list(_outcomes(network, cells, parts, labels, len(manifest.classes)))

    def answer(question: Question, network: str) -> tuple[Answer, ...]:
        lines = []
        for row in question.rows:
            name = question.reference.get(row.depth)
            other = outcomes.get((network, name or ""), [None])[0]
            for own in (own for own in outcomes[network, row.name] if own.reading in row.readings):
                if other is None or own is other:
                    lines.append(Answer(own, None, None))
                else:
                    compared = difference(own.probabilities_SNK, other.probabilities_SNK, labels, groups)
                    lines.append(Answer(own, name, compared))
        return tuple(lines)

    answers = [(question, {network: answer(question, network) for network in trained}) for question in chosen]
    each = tuple(outcome for found in outcomes.values() for outcome in found)
    count = len(np.unique(parts.group_N))
    return StudyResults(each, tuple(answers), len(labels), count, len(parts.validation), parts.folds, steps)


def _outcomes(
    network: str, cells: Sequence[Cell], parts: Parts, labels: NDArray[np.int64], classes: int
) -> Iterator[Outcome]:
    """The outcomes of a row's cells, one for each reading."""
    row, seeds = cells[0].row, sorted({cell.seed for cell in cells})
    place = {int(image): position for position, image in enumerate(parts.tested)}
    found = {reading: np.zeros((len(seeds), len(labels), classes), np.float32) for reading in row.readings}
    about: list[dict[str, float]] = []
    for cell in cells:
        rows = [place[int(image)] for image in parts.test(cell.fold)]
        with safe_open(cell.path, "np") as file:
            about.append(json.loads(file.metadata()["about"]))
            for reading, table in found.items():
                table[seeds.index(cell.seed), rows] = file.get_tensor(f"{reading}, test")
    seconds = float(np.mean([own["seconds"] for own in about]))
    departure = float(np.mean([own["departure"] for own in about])) if "departure" in about[0] else None
    for reading, table in found.items():
        own = tuple(scores(part, labels) for part in table)
        yield Outcome(network, row, reading, cells[0].rate, own, seconds, departure, table)
