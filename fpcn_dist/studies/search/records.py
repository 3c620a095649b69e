"""What is known of every trial of a search: results.json, results.csv, and the best of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text

RESULTS_FILE, RESULTS_TABLE = "results.json", "results.csv"
_FORMAT = 1
GIVEN_UP = "given up: "
"""How the reason of a trial begins that was lost too often, and that may be tried again."""


@dataclass(frozen=True)
class TrialRecord:
    """All that is known of one trial.

    Attributes:
        number: from 0 on; names its folder.
        settings: the searched values, by the dotted names of their fields.
        drawn: what Optuna drew, which the settings follow from; empty in a population, and in older files.
        pairs: pairs of a batch that its teacher contrasts; ``None`` where none is trained.
        state: "running"; "finished" its whole schedule; "stopped" early by the scheduler; "failed".
        history: (epoch, best validation accuracy so far) of each evaluation; accuracies are shares of 1.
        latency: milliseconds of one image, where that is an objective.
        seconds: how long it has trained for.
        reason: why it failed.
    """

    number: int
    settings: dict[str, Any]
    pairs: int | None = None
    state: str = "running"
    history: tuple[tuple[float, float], ...] = ()
    latency: float | None = None
    seconds: float = 0.0
    reason: str | None = None
    drawn: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do: it was not interrupted, nor given up for what it lost."""
        return self.state in ("finished", "stopped") or (self.state == "failed" and not self.lost)

    @property
    def lost(self) -> bool:
        """Whether it was given up because a process or a node was lost, again and again."""
        return self.state == "failed" and (self.reason or "").startswith(GIVEN_UP)

    @property
    def accuracy(self) -> float | None:
        """The best accuracy on the validation images so far."""
        return self.history[-1][1] if self.history else None

    @property
    def epoch(self) -> float | None:
        """The last epoch that was evaluated."""
        return self.history[-1][0] if self.history else None


@dataclass(frozen=True)
class SearchResults:
    """All that is known of a search.

    Attributes:
        stage: "teacher", "student" or "joint".
        objectives: "accuracy", perhaps with "latency".
        epochs: the epochs of a whole trial.
        trials: by number.
        log_fields: names of those searched by orders of magnitude.
        importance: share of each field in how well trials did; they sum to 1; empty where too few have ended.
    """

    stage: str
    objectives: tuple[str, ...]
    epochs: int
    trials: tuple[TrialRecord, ...]
    log_fields: tuple[str, ...] = ()
    importance: dict[str, float] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all searched fields, in the order in which they first appear."""
        return tuple(dict.fromkeys(name for trial in self.trials for name in trial.settings))

    @property
    def finished(self) -> tuple[TrialRecord, ...]:
        return tuple(trial for trial in self.trials if trial.state == "finished" and trial.accuracy is not None)

    @property
    def best(self) -> TrialRecord | None:
        """The most accurate of the trials that finished; among equals the first."""
        return max(self.finished, key=lambda trial: (trial.accuracy or 0.0, -trial.number), default=None)

    @property
    def pareto(self) -> tuple[TrialRecord, ...]:
        """The finished trials that no other one beats in both accuracy and latency, the fastest first."""
        rest = sorted(
            (trial for trial in self.finished if trial.latency is not None),
            key=lambda trial: (trial.latency or 0.0, -(trial.accuracy or 0.0)),
        )
        front: list[TrialRecord] = []
        for trial in rest:
            if not front or (trial.accuracy or 0.0) > (front[-1].accuracy or 0.0):
                front.append(trial)
        return tuple(front)


def save_results(folder: Path, results: SearchResults) -> None:
    """Write results.json and results.csv, each whole or not at all."""
    write_text(folder / RESULTS_FILE, json.dumps({"format": _FORMAT, **asdict(results)}, indent=1) + "\n")
    write_text(folder / RESULTS_TABLE, _csv(results.trials, results.fields))


def load_results(folder: Path) -> SearchResults | None:
    """Read what :func:`save_results` wrote; ``None`` where there is nothing.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RESULTS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != _FORMAT:
            raise ValueError("it was written by another version of fpcn_dist")
        trials = tuple(
            TrialRecord(**trial | {"history": tuple(map(tuple, trial["history"]))}) for trial in values.pop("trials")
        )
        values |= {name: tuple(values[name]) for name in ("objectives", "log_fields")}
        return SearchResults(**values, trials=trials)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("results", path, f"is damaged ({error})", "remove it") from None


def _csv(trials: Sequence[TrialRecord], fields: Sequence[str]) -> str:
    buffer = io.StringIO()
    columns = ("trial", "state", "accuracy", "epoch", "pairs", "latency_ms", "seconds", *fields, "reason")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for trial in trials:
        standing = [trial.state, trial.accuracy, trial.epoch, trial.pairs, trial.latency, round(trial.seconds, 1)]
        settings = [trial.settings.get(name) for name in fields]
        writer.writerow([trial.number, *standing, *settings, trial.reason])
    return buffer.getvalue()
