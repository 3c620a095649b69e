"""Where the batches of a distillation get their teacher's logits from: a bank, or the teacher itself in each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import printable
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.training.soft_labels.bank import SoftLabelBank, prepare_bank
from fpcn_dist.training.soft_labels.teacher import open_teacher

OnlineTeacher = Callable[[Batch], Batch]


def bank_folder(recipe: Recipe, output: Path) -> Path:
    """Where the bank of a recipe lies."""
    return Path(recipe.distill.bank) if recipe.distill.bank else output / "bank"


def attach_teacher(
    recipes: Sequence[Recipe], output: Path, manifest: Manifest, ranks: Ranks
) -> tuple[SoftLabelBank | None, OnlineTeacher | None]:
    """The bank, or the teacher, of the recipes of task "distill" among ``recipes``; neither where there are none.

    A bank that is not complete is completed first, each rank writing its share. Collective.

    Raises:
        UserError: the recipes have different teachers; see :func:`open_teacher` and :func:`prepare_bank`.
    """
    students = [recipe for recipe in recipes if recipe.task == "distill"]
    if not students:
        return None, None
    recipe = students[0]
    source = ("teacher_sha256", "teacher_mode", "bank")
    if any(getattr(s.distill, name) != getattr(recipe.distill, name) for s in students for name in source):
        raise UserError("distill.teacher", None, "differs between recipes that share batches", "give them one teacher")
    if any(s.train.precision != recipe.train.precision for s in students):
        reason = "differs between students that share a teacher, which computes in it, too"
        raise UserError("train.precision", None, reason, "make it the same in all")
    # Before a bank is begun, which would be of no use with a teacher that does not fit.
    teacher = open_teacher(recipe, manifest, ranks.device)
    ranks.on_first(lambda: print(printable(teacher), flush=True))
    if recipe.distill.teacher_mode == "online":
        return None, lambda batch: dataclasses.replace(batch, teacher_logits=teacher(batch.images))
    folder = bank_folder(recipe, output)
    ranks.on_first(lambda: prepare_bank(folder, recipe, manifest) and None)
    bank = SoftLabelBank(folder, recipe, manifest)
    if bank.missing():
        bank.write(teacher, share=ranks.rank, shares=ranks.world_size, device=ranks.device, show=ranks.first)
        bank.wait()
    return bank, None
