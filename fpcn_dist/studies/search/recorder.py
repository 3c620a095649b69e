"""What is kept and shown of a search while it runs: Tune tells it of every change."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from fpcn_dist.studies.cluster.errors import last_line
from fpcn_dist.studies.search.live import TrialTable
from fpcn_dist.studies.search.plan import Plan, number_of
from fpcn_dist.studies.search.records import GIVEN_UP, SearchResults, TrialRecord, load_results, save_results

_BETWEEN_WRITES = 2.0
"""Seconds between two writings of results.json, unless a trial has begun or ended."""


class Recorder(tune.Callback):
    """Keeps results.json and results.csv, and shows the trials.

    Args:
        plan: the plan of the search.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.records: dict[int, TrialRecord] = {}
        self.seconds = 0.0
        """Spent inside of trials since this process began."""
        self._earlier: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._written = 0.0
        self._table = TrialTable(plan.epochs)

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its callbacks, for a resumption of its own that nobody asks for.
        return {}

    def setup(self, *_: Any, **__: Any) -> None:
        before = load_results(self.plan.output)
        self.records = {trial.number: trial for trial in before.trials} if before else {}
        self._earlier = {number: record.seconds for number, record in self.records.items()}
        self._table.start()

    def close(self) -> None:
        """Stop drawing; write what is known."""
        self._table.stop()
        self._write()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        record = self._record(trial)
        if record.state != "running":
            record = replace(record, state="running", reason=None)
        self._earlier[record.number] = record.seconds
        self._last[record.number] = 0.0
        self._note(record, now=True)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        record = self._record(trial)
        number, seconds = record.number, result["seconds"]
        self.seconds += max(0.0, seconds - self._last.get(number, 0.0))
        self._last[number] = seconds
        record = replace(
            record,
            seconds=self._earlier.get(number, 0.0) + seconds,
            latency=result.get("latency"),
            settings=trial.config["settings"],
            pairs=self.plan.count_pairs(trial.config["settings"]),
        )
        if "failure" in result:
            record = replace(record, state="failed", reason=result["failure"], latency=None)
        else:
            before = tuple(point for point in record.history if point[0] < result["epoch"])
            record = replace(record, history=(*before, (result["epoch"], result["accuracy"])))
        self._note(record)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        record = self._record(trial)
        if record.state == "running":
            whole = record.epoch is not None and record.epoch >= self.plan.epochs
            record = replace(record, state="finished" if whole else "stopped")
        self._note(record, now=True)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error() or "lost"
        reason = f"{GIVEN_UP}{last_line(error)[:300]}"
        self._note(replace(self._record(trial), state="failed", reason=reason), now=True)

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        self._table.refresh(list(self.records.values()))

    def results(self) -> SearchResults:
        """The results of all trials as they are known now."""
        objectives = ("accuracy", "latency") if self.plan.latency else ("accuracy",)
        trials = tuple(self.records[number] for number in sorted(self.records))
        return SearchResults(self.plan.stage, objectives, self.plan.epochs, trials, self.plan.log_fields)

    def _record(self, trial: Trial) -> TrialRecord:
        number = number_of(trial.config, trial.trial_id)
        if number not in self.records:
            settings, drawn = trial.config["settings"], trial.config.get("drawn", {})
            self.records[number] = TrialRecord(number, settings, self.plan.count_pairs(settings), drawn=drawn)
        return self.records[number]

    def _note(self, record: TrialRecord, *, now: bool = False) -> None:
        self.records[record.number] = record
        self._table.note(record)
        if now or time.monotonic() - self._written > _BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        save_results(self.plan.output, self.results())
        self._written = time.monotonic()
