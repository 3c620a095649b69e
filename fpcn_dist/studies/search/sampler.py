"""Who draws the settings of trials: Optuna's TPE inside of Tune, which in stage "joint" hands trained teachers on."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from ray.tune.search.optuna import OptunaSearch

from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.studies.search.plan import TEACHER, Plan
from fpcn_dist.studies.search.space import Settings
from fpcn_dist.training.view_bank import WRITTEN

_START_UP = 10
"""Trials drawn at random before what is known is made use of; a third of a short search."""


def build_sampler(plan: Plan, *, trials: int, trials_per_teacher: int, seed: int) -> OptunaSearch:
    """The search algorithm for Tune: its configs are ``{"number": ..., "settings": ...}`` and Optuna's parameters."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start_up = min(_START_UP, max(2, trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = optuna.samplers.TPESampler(seed=seed, n_startup_trials=start_up, constant_liar=True)
    return _Sampler(plan, trials_per_teacher, tpe)


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

    def __init__(self, plan: Plan, trials_per_teacher: int, tpe: optuna.samplers.BaseSampler) -> None:
        both: dict[str, Any] = {"metric": ["accuracy", "latency"], "mode": ["max", "min"]}
        one: dict[str, Any] = {"metric": "accuracy", "mode": "max"}
        super().__init__(functools.partial(_settings, plan), sampler=tpe, **(both if plan.latency else one))
        self._plan, self._most, self._count = plan, trials_per_teacher, 0
        # By folder: Optuna's parameters of the teacher, and the trials that it has served in.
        self._teachers: dict[str, dict[str, Any]] = {}
        self._served: dict[str, list[str]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        study: Any = self._ot_study
        free = [name for name, served in self._served.items() if len(served) < self._most and _is_ready(name)]
        if free:
            study.enqueue_trial(self._teachers[free[0]])
        config = super().suggest(trial_id)
        assert config is not None
        if self._plan.stage == "joint":
            teacher = str(self._plan.teacher_folder(config["settings"]))
            if teacher in self._served and not _is_ready(teacher):
                # Another trial is training it: ask again later.
                study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)
                return None
            parameters = self._ot_trials[trial_id].params
            self._teachers[teacher] = {n: value for n, value in parameters.items() if n.startswith(TEACHER)}
            self._served.setdefault(teacher, []).append(trial_id)
        self._count += 1
        return {"number": self._count - 1, "settings": config["settings"]}

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
