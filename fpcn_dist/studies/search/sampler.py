"""Who draws the settings of trials: Optuna's TPE inside of Tune, which in stage "joint" hands trained teachers on."""

from __future__ import annotations

import functools
import itertools
import math
import random
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from ray.tune.search.optuna import OptunaSearch

from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.studies.search.plan import TEACHER, Plan
from fpcn_dist.studies.search.records import TrialRecord
from fpcn_dist.studies.search.space import Settings
from fpcn_dist.training.view_bank import WRITTEN

_START_UP = 10
"""Trials drawn at random before what is known is made use of; a third of a short search."""


def build_sampler(
    plan: Plan, *, trials: int, trials_per_teacher: int, seed: int, before: Sequence[TrialRecord] = ()
) -> OptunaSearch:
    """The search algorithm for Tune: its configs are ``{"number": ..., "settings": ..., "drawn": ...}``.

    Args:
        plan: the plan of the search.
        trials: of the whole search.
        trials_per_teacher: ``search.trials_per_teacher``.
        seed: of what is drawn.
        before: the trials of earlier starts. It learns from those that have ended, and begins with the others.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start_up = min(_START_UP, max(2, trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Another start draws other values than those it finds.
        tpe = optuna.samplers.TPESampler(seed=seed + len(before), n_startup_trials=start_up, constant_liar=True)
    return _Sampler(plan, trials_per_teacher, tpe, before)


def draw_at_random(plan: Plan, trials: int, seed: int) -> list[Settings]:
    """The first settings of a population."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [plan.suggest(study.ask()) for _ in range(trials)]


def perturbing(plan: Plan, seed: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function by which population-based training changes the settings that a trial takes over."""
    draw = random.Random(seed)
    (space,) = plan.spaces.values()

    def change(config: dict[str, Any]) -> dict[str, Any]:
        return config | {"settings": space.perturb(config["settings"], draw)}

    return change


def _settings(plan: Plan, trial: Any) -> dict[str, Any]:
    return {"settings": plan.suggest(trial)}


class _Sampler(OptunaSearch):
    """TPE. In stage "joint" a new teacher only where no trained one has served in fewer trials than it should.

    A teacher is handed on once it is trained and its soft labels are written, so no trial waits for another's.
    """

    def __init__(
        self, plan: Plan, trials_per_teacher: int, tpe: optuna.samplers.BaseSampler, before: Sequence[TrialRecord]
    ) -> None:
        both: dict[str, Any] = {"metric": ["accuracy", "latency"], "mode": ["max", "min"]}
        one: dict[str, Any] = {"metric": "accuracy", "mode": "max"}
        super().__init__(functools.partial(_settings, plan), sampler=tpe, **(both if plan.latency else one))
        self._plan, self._most = plan, trials_per_teacher
        self._numbers = {record.number for record in before}
        self._again = deque(record for record in before if not record.ended)
        # By folder: Optuna's parameters of the teacher, and the trials that it has served in.
        self._teachers: dict[str, dict[str, Any]] = {}
        self._served: dict[str, list[str]] = {}
        for record in before:
            if record.ended and record.drawn:
                self._learn(record)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        study: Any = self._ot_study
        free = [name for name, served in self._served.items() if len(served) < self._most and _is_ready(name)]
        again = self._again[0] if self._again else None
        if again is not None and again.drawn:
            study.enqueue_trial(again.drawn)
        elif free:
            study.enqueue_trial(self._teachers[free[0]])
        config = super().suggest(trial_id)
        assert config is not None
        drawn, settings = dict(self._ot_trials[trial_id].params), config["settings"]
        if self._plan.stage == "joint":
            teacher = str(self._plan.teacher_folder(settings))
            if teacher in self._served and not _is_ready(teacher):
                # Another trial is training it: ask again later.
                study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)
                return None
            self._serve(teacher, drawn, trial_id)
        if again is not None:
            self._again.popleft()
        # An interrupted start may have given numbers to trials that never began.
        number = next(n for n in itertools.count() if n not in self._numbers) if again is None else again.number
        self._numbers.add(number)
        return {"number": number, "settings": settings, "drawn": drawn}

    def _learn(self, record: TrialRecord) -> None:
        """Take what a trial of an earlier start reached for one of this study's."""
        study: Any = self._ot_study
        fixed = optuna.trial.FixedTrial(record.drawn)
        settings = self._plan.suggest(fixed)
        failed = record.state == "failed" or record.accuracy is None
        accuracy, latency = (0.0, math.inf) if failed else (record.accuracy or 0.0, record.latency)
        values = [accuracy, math.inf if latency is None else latency] if self._plan.latency else [accuracy]
        study.add_trial(
            optuna.trial.create_trial(params=fixed.params, distributions=fixed.distributions, values=values)
        )
        if self._plan.stage == "joint":
            self._serve(str(self._plan.teacher_folder(settings)), record.drawn, f"earlier-{record.number}")

    def _serve(self, teacher: str, drawn: dict[str, Any], trial_id: str) -> None:
        self._teachers[teacher] = {name: value for name, value in drawn.items() if name.startswith(TEACHER)}
        self._served.setdefault(teacher, []).append(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        super().on_trial_complete(trial_id, result, error)
        for teacher, served in list(self._served.items()):
            if served == [trial_id] and not _is_ready(teacher):
                del self._served[teacher]  # it will not be trained any more


def _is_ready(folder: str) -> bool:
    """Whether a teacher is trained, and its soft labels are written."""
    teacher = Path(folder)
    written = teacher / "bank" / WRITTEN
    if RunFolder(teacher).read_outcome()[0] != "finished" or not written.is_file():
        return False
    return bool(np.fromfile(written, dtype=np.uint8).all())
