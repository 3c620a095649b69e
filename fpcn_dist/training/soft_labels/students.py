"""Recipes of students, checked before any of them is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fpcn_dist.models import build_backbone
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.training.pretrained import name_preprocessing
from fpcn_dist.training.soft_labels.teacher import name_teacher


def student_name(network: str) -> str:
    """What the run of a student is called, in file names too: its network, without the slash of torchvision's names."""
    return network.replace("/", "-")


def check_recipe(recipe: Recipe, students: Sequence[str]) -> Recipe:
    """``recipe`` with its teacher found, and with the preprocessing that all students and their baselines have.

    Raises:
        UserError: there is none, or see :func:`check_students`.
    """
    check_students(recipe, students)
    if recipe.distill.teacher is not None:
        absolute = str(Path(recipe.distill.teacher).resolve())
        recipe = recipe.changed(**{"distill.teacher": absolute})
    return name_preprocessing(name_teacher(recipe))


def check_students(recipe: Recipe, students: Sequence[str]) -> None:
    """Refuse students that cannot be trained together by this recipe.

    Raises:
        UserError: names what does not fit.
    """
    if recipe.task != "distill":
        hint = "use launch/recipes/distill.yaml, or set task to 'distill'"
        raise UserError("task", recipe.task, "students are trained by task 'distill'", hint)
    if recipe.engine.name != "ddp":
        reason = "students that share ranks are trained by DDP"
        raise UserError("engine.name", recipe.engine.name, reason, "set it to 'ddp'")
    twice = [name for name in students if list(students).count(name) > 1]
    if twice or not students:
        reason = f"{twice[0]} is named twice" if twice else "no student is named"
        raise UserError("--students", ",".join(students) or None, reason, "name each student once")
    for student in students:
        _require_seeing(student, recipe)


def _require_seeing(student: str, recipe: Recipe) -> None:
    """Refuse an unknown network, or one that cannot see images of the recipe's size."""
    backbone, size = build_backbone(student, norm=recipe.model.norm).eval(), recipe.data.crop
    try:
        with torch.inference_mode():
            backbone(torch.zeros(1, 3, size, size))
    except (UserError, RuntimeError, AssertionError, ValueError) as error:
        why = f"{error.reason}; {error.hint}" if isinstance(error, UserError) else " ".join(str(error).split())[:200]
        reason = f"it cannot see images of {size} px ({why})"
        raise UserError("--students", student, reason, "leave it out, or change data.crop, the teacher's too") from None
