"""What a user asks of a search, checked, and made into a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from fpcn_dist.data.index.manifest import CHECK_FIELDS, SPLIT_FIELDS
from fpcn_dist.recipe.preprocessing import Preprocessing
from fpcn_dist.recipe.schema import ModelConfig, Recipe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.search.plan import Plan, build_spaces
from fpcn_dist.studies.search.resources import Bundle
from fpcn_dist.studies.search.space import Stage
from fpcn_dist.tasks import TASKS
from fpcn_dist.training.soft_labels.students import check_recipe, check_students

Scheduler = Literal["asha", "pbt", "none"]
OBJECTIVES = (("accuracy",), ("accuracy", "latency"))


@dataclasses.dataclass(frozen=True)
class SearchRequest:
    """A search.

    Attributes:
        recipe: the recipe of what is searched: a teacher's or, in stage "student", a student's.
        stage: what to search.
        student: recipe of a student, in stage "joint".
        students: networks to distil in each trial; none: the recipe's own.
        trials: how many.
        scheduler: who ends trials early.
        objectives: "accuracy", or "accuracy" and "latency".
        workers, gpus: the ranks and the GPUs of a trial; ``None`` lets the cluster decide.
    """

    recipe: Recipe
    stage: Stage
    student: Recipe | None = None
    students: tuple[str, ...] = ()
    trials: int = 40
    scheduler: Scheduler = "asha"
    objectives: tuple[str, ...] = ("accuracy",)
    workers: int | None = None
    gpus: float | None = None

    @property
    def teacher(self) -> Recipe | None:
        """The recipe of the teacher that is searched; ``None`` in stage "student"."""
        return None if self.stage == "student" else self.recipe


def checked(request: SearchRequest) -> SearchRequest:
    """``request`` with what it leaves open: the student's recipe under ``student``, its teacher found, paths absolute.

    Raises:
        UserError: parts of it do not go together.
    """
    if request.trials < 1:
        raise UserError("--trials", request.trials, "leaves nothing to do", "give 1 or more")
    if request.objectives not in OBJECTIVES:
        hint = "give accuracy, or accuracy,latency"
        raise UserError("--multi-objective", ",".join(request.objectives), "is not known", hint)
    recipe, student, stage = request.recipe, request.student, request.stage
    if stage != "student" and recipe.task == "distill":
        raise UserError("task", recipe.task, f"stage '{stage}' trains a teacher", "give a teacher's recipe")
    if stage != "joint" and student is not None:
        raise UserError("--student-recipe", None, f"stage '{stage}' has one recipe", "give it with --recipe")
    if stage == "teacher" and request.students:
        raise UserError("--students", ",".join(request.students), "stage 'teacher' has none", "leave it out")
    if stage == "joint" and student is None:
        raise UserError("--student-recipe", None, "stage 'joint' trains students, too", "give a student's recipe")
    if stage == "student":
        student = recipe
    students = request.students
    if student is not None:
        students = students or (student.model.backbone,)
        if stage == "student":
            student = check_recipe(student, students)
        else:
            check_students(student, students)
            _require_same_images(recipe, student)
        student = _absolute(student)
    _require_population(request, students)
    return dataclasses.replace(request, recipe=_absolute(recipe), student=student, students=students)


def require_searchable(request: SearchRequest, classes: int) -> None:
    """Refuse a checked request whose fields cannot be searched in data of so many classes.

    Raises:
        UserError: names the field.
    """
    for space in build_spaces(request.stage, request.teacher, request.student, classes).values():
        if request.scheduler == "pbt":
            space.require_mutable()


def make_plan(request: SearchRequest, output: Path, classes: int, bundles: list[Bundle]) -> Plan:
    """The plan of a checked request.

    Args:
        request: see :func:`checked`.
        output: absolute folder.
        classes: number of classes of the data.
        bundles: resources of a trial, one a rank.
    """
    threads = {"data.threads": int(bundles[0]["CPU"])}
    teacher, student, features = request.teacher, request.student, feature_regions(request, classes) is not None
    if request.stage == "student" and student is not None and student.distill.bank is None:
        student = student.changed(**{"distill.bank": str(output / "bank")})
    if features:
        bank = {"train.feature_bank": str(output / "features")}
        teacher, student = (recipe and recipe.changed(**bank) for recipe in (teacher, student))
    return Plan(
        stage=request.stage,
        teacher=teacher and teacher.changed(**threads),
        student=student and student.changed(**threads),
        students=request.students,
        output=output,
        classes=classes,
        workers=len(bundles),
        latency="latency" in request.objectives,
        population=request.scheduler == "pbt",
        features=features,
    )


def feature_regions(request: SearchRequest, classes: int) -> list[ModelConfig] | None:
    """The regions of the features that all trials of a checked request share: the backbone is frozen for ever, shows
    the same views in each, and what is searched is the head alone. ``None`` where that is not so.

    Raises:
        UserError: see :class:`Space`.
    """
    spaces = build_spaces(request.stage, request.teacher, request.student, classes)
    recipe = request.student or request.recipe
    frozen = recipe.optim.freeze == "backbone" and recipe.optim.freeze_epochs is None
    alone = request.stage != "joint" and len(request.students) <= 1 and recipe.train.feature_bank is True
    if not (frozen and alone) or recipe.data.distinct_views is None or not TASKS[recipe.task].encodes_views:
        return None
    (space,) = spaces.values()
    return space.regions()


def _absolute(recipe: Recipe) -> Recipe:
    """``recipe`` with absolute paths: trials have working directories of their own."""
    weights = recipe.model.pretrained
    if isinstance(weights, str) and Path(weights).exists():
        recipe = recipe.changed(**{"model.pretrained": str(Path(weights).resolve())})
    if recipe.distill.bank is not None:
        recipe = recipe.changed(**{"distill.bank": str(Path(recipe.distill.bank).resolve())})
    return recipe


def _require_same_images(teacher: Recipe, student: Recipe) -> None:
    """Refuse recipes that would give teacher and student other images, another split or images of another size.

    Raises:
        UserError: names the first field that differs.
    """
    preprocessing = tuple(f"data.{name}" for name in Preprocessing.model_fields)
    for field in (*SPLIT_FIELDS, *CHECK_FIELDS, "data.resize", "data.crop", "data.fit", *preprocessing):
        section, _, name = field.rpartition(".")
        theirs, ours = (getattr(getattr(r, section) if section else r, name) for r in (teacher, student))
        left_to_the_teacher = field in preprocessing and ours is None
        if theirs != ours and not left_to_the_teacher:
            reason = f"differs from the teacher's recipe, which has {theirs}, and both see the same images"
            raise UserError(f"--student-recipe: {field}", ours, reason, "make it the same in both")


def _require_population(request: SearchRequest, students: tuple[str, ...]) -> None:
    """Refuse what population-based training cannot do: it carries the weights of one network from trial to trial."""
    if request.scheduler != "pbt":
        return
    if request.stage == "joint" or len(students) > 1:
        what = "stage 'joint' trains" if request.stage == "joint" else "a trial with several students has"
        raise UserError("--scheduler", "pbt", f"{what} more than one network", "use asha")
    if "latency" in request.objectives:
        raise UserError("--scheduler", "pbt", "it knows one objective", "use asha, or drop --multi-objective")
    if request.trials < 2:
        raise UserError("--trials", request.trials, "is no population", "give 4 or more")
