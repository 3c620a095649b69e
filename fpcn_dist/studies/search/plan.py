"""What all trials of a search have in common, and what a trial's settings make of it; it travels to every node."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.studies.search.space import Chooser, Settings, Space, Stage
from fpcn_dist.training.soft_labels.students import student_name

TEACHER, STUDENT = "teacher.", "student."
"""Prefixes of field names in stage "joint", where both have a recipe."""


def build_spaces(stage: Stage, teacher: Recipe | None, student: Recipe | None, classes: int) -> dict[str, Space]:
    """The searched fields of each recipe, by the prefix of their names; see :class:`Plan` for the arguments.

    Raises:
        UserError: a space cannot be searched.
    """
    recipes = {"teacher": teacher, "student": student}
    prefixes = {"teacher": TEACHER, "student": STUDENT} if stage == "joint" else dict.fromkeys(recipes, "")
    return {prefixes[n]: Space(recipe, n, classes) for n, recipe in recipes.items() if recipe is not None}


@dataclass(frozen=True)
class Plan:
    """A search.

    Attributes:
        stage: what is searched: "teacher", "student", or both, "joint".
        teacher: recipe of the teacher; ``None`` in stage "student".
        student: recipe of the students; ``None`` in stage "teacher".
        students: names of the networks that a trial distils together; their mean accuracy counts.
        output: absolute folder, on storage that every node sees.
        classes: number of classes of the data.
        workers: ranks of a trial.
        latency: whether a trial also tells the milliseconds of an image.
        population: whether trials take over one another's weights (population-based training).
        features: whether all trials look features up in the bank that ``main`` names, and never at an image.
    """

    stage: Stage
    teacher: Recipe | None
    student: Recipe | None
    students: tuple[str, ...]
    output: Path
    classes: int
    workers: int
    latency: bool
    population: bool
    features: bool = False

    @property
    def main(self) -> Recipe:
        """The recipe of what is measured in the end."""
        recipe = self.teacher if self.student is None else self.student
        assert recipe is not None
        return recipe

    @property
    def epochs(self) -> int:
        """The number of epochs of a whole trial; those of its teacher do not count."""
        return self.main.train.epochs

    @cached_property
    def spaces(self) -> dict[str, Space]:
        """The searched fields of each recipe, by the prefix of their names."""
        return build_spaces(self.stage, self.teacher, self.student, self.classes)

    @property
    def log_fields(self) -> tuple[str, ...]:
        """The names of the fields that are searched by orders of magnitude."""
        return tuple(p + n for p, space in self.spaces.items() for n, d in space.dimensions.items() if d.log)

    def suggest(self, trial: Any) -> Settings:
        """Draw a value for each field from an ``optuna.Trial``."""
        settings: Settings = {}
        for prefix, space in self.spaces.items():
            drawn = space.suggest(_Prefixed(trial, prefix))
            settings |= {prefix + name: value for name, value in drawn.items()}
        return settings

    def count_pairs(self, settings: Settings) -> int | None:
        """Pairs that a batch of the teacher contrasts; ``None`` where none is trained."""
        prefix = TEACHER if self.stage == "joint" else ""
        return self.spaces[prefix].count_pairs(_part(settings, prefix)) if self.teacher is not None else None

    def folder(self, number: int) -> Path:
        """The folder of the trial with this number."""
        return self.output / "trials" / f"{number:05d}"

    def log(self, number: int, rank: int) -> Path:
        """The file that the output of a trial's rank is appended to."""
        return self.output / "logs" / f"trial-{number:05d}-rank{rank}.log"

    def runs(self, number: int, settings: Settings) -> dict[Path, Recipe]:
        """Recipes of a trial by run folder, without its teacher's.

        Raises:
            UserError: these values do not go together.
        """
        folder = self.folder(number)
        if self.stage == "teacher":
            return {folder: self.spaces[""].recipe(settings)}
        prefix = STUDENT if self.stage == "joint" else ""
        recipe = self.spaces[prefix].recipe(_part(settings, prefix))
        if self.stage == "joint":
            teacher = self.teacher_folder(settings)
            recipe = recipe.changed(**{"distill.teacher": str(teacher), "distill.bank": str(teacher / "bank")})
        networks = {student_name(network): network for network in self.students}
        return {folder / name: recipe.changed(**{"name": name, "model.backbone": networks[name]}) for name in networks}

    def teacher_folder(self, settings: Settings) -> Path:
        """Run folder of the teacher of a joint trial, which trials that differ only in the student's fields share."""
        own = json.dumps(_part(settings, TEACHER), sort_keys=True)
        return self.output / "teachers" / hashlib.sha256(own.encode()).hexdigest()[:12]

    def teacher_recipe(self, settings: Settings) -> Recipe:
        """The recipe of the teacher of a joint trial."""
        return self.spaces[TEACHER].recipe(_part(settings, TEACHER))


def _part(settings: Settings, prefix: str) -> Settings:
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


class _Prefixed:
    """A trial that knows its parameters by longer names."""

    def __init__(self, trial: Chooser, prefix: str) -> None:
        self._trial, self._prefix = trial, prefix

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self._trial.suggest_categorical(self._prefix + name, choices)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return self._trial.suggest_int(self._prefix + name, low, high, log=log)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self._trial.suggest_float(self._prefix + name, low, high, log=log)


def number_of(config: dict[str, Any], trial_id: str) -> int:
    """The number of one of Tune's trials.

    A sampler numbers the trials that it suggests. In a population settings move from trial to trial, so that they
    cannot carry a number; the number is then the count at the end of the name that Tune gives the trial.

    Args:
        config: what Tune hands to the trial.
        trial_id: Tune's name of the trial.
    """
    return config["number"] if "number" in config else int(trial_id.rpartition("_")[2])


def run_folders(folder: Path) -> Iterator[Path]:
    """The run folders of a trial: the trial's own folder, or, where it trains students, those below it."""
    for recipe in [*folder.glob("recipe.yaml"), *sorted(folder.glob("*/recipe.yaml"))]:
        yield recipe.parent
