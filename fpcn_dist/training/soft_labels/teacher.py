"""The teacher of a distillation: a trained model that only looks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fpcn_dist.data.index.manifest import SPLIT_FIELDS, Manifest
from fpcn_dist.deploy.onnx_backbone import with_frozen_backbone
from fpcn_dist.models import Classifier
from fpcn_dist.models.modes import autocast
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.model_folder import WEIGHTS, ModelInfo, load_model
from fpcn_dist.runtime.errors import UserError


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode whose parameters need no gradient, outside of every engine.

    Attributes:
        folder: where it comes from.
        sha256: hash of its weights file.
        evaluation: what it scored, where that is known.
        model: the network; on a CPU its backbone may run through onnxruntime, in banks and in steps alike.
        info: its classes and how its images were cut.
        precision: "fp32" or "bf16", the arithmetic of the recipe that it teaches in.
    """

    folder: Path
    sha256: str
    evaluation: Evaluation | None
    model: Classifier
    info: ModelInfo
    precision: str

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H', W'] to raw logits [B, K] float32, as in evaluation."""
        with autocast(images.device, self.precision):
            pooled = self.model.pool(images).pooled
        return self.model.logits(pooled.float())

    def __str__(self) -> str:
        score = "not evaluated"
        if self.evaluation is not None:
            score = f"{100 * self.evaluation.accuracy:.1f} % of {self.evaluation.images} {self.evaluation.split} images"
        return f"teacher {self.folder}, weights sha256 {self.sha256[:16]}, accuracy {score}"


def weights_sha256(folder: Path) -> str:
    """Hash of the weights file in an exported model's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise UserError(
            "distill.teacher", folder, f"holds no {WEIGHTS}", "give the run folder of a training that has ended"
        )
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def name_teacher(recipe: Recipe) -> Recipe:
    """``recipe`` with the hash of its teacher's weights; for the first rank, before anything is read or written.

    Raises:
        UserError: there is no teacher, or it is not the one that the recipe names.
    """
    distill = recipe.distill
    if recipe.task != "distill":
        return recipe
    if distill.teacher is None:
        raise UserError("distill.teacher", None, "task 'distill' needs a teacher", "give --distill.teacher RUN")
    found = weights_sha256(Path(distill.teacher))
    if distill.teacher_sha256 not in (None, found):
        raise UserError(
            "distill.teacher",
            distill.teacher,
            f"its weights (sha256 {found[:16]}) are not those that the recipe names ({distill.teacher_sha256[:16]})",
            "give the teacher that the recipe was made with, or drop distill.teacher_sha256",
        )
    return recipe.changed(**{"distill.teacher_sha256": found})


def open_teacher(recipe: Recipe, manifest: Manifest, device: torch.device) -> Teacher:
    """The teacher that a recipe of task "distill" names, fit to teach on the images of ``manifest``.

    Raises:
        UserError: no model in its folder; other classes than the data; another image size or preprocessing than the
            recipe's; or it was trained on images that its students are measured on.
    """
    assert recipe.distill.teacher is not None and recipe.distill.teacher_sha256 is not None
    folder = Path(recipe.distill.teacher)
    model, info = load_model(folder, device)
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # As many for a bank as for a teacher in each step: both must round alike, and do on any number of ranks.
    views = len(manifest.ids("train")) * (recipe.data.views or recipe.train.epochs)
    teacher = Teacher(
        folder,
        recipe.distill.teacher_sha256,
        Evaluation.load(folder),
        with_frozen_backbone(model.requires_grad_(False), views),
        info,
        recipe.train.precision,
    )
    _require_same_classes(teacher, manifest)
    _require_same_images(teacher, recipe)
    _require_unseen(teacher, manifest)
    return teacher


def _require_same_classes(teacher: Teacher, manifest: Manifest) -> None:
    if teacher.info.classes != manifest.classes:
        known, wanted = ", ".join(teacher.info.classes), ", ".join(manifest.classes)
        reason = f"it tells apart {known}, but the data have {wanted}"
        raise UserError("distill.teacher", teacher.folder, reason, "give a teacher that was trained on these classes")


def _require_same_images(teacher: Teacher, recipe: Recipe) -> None:
    theirs, ours = teacher.info.preprocessing, recipe.data
    for field, wanted in theirs.preprocessing:
        value = getattr(ours.preprocessing, field)
        if value != wanted:
            raise UserError(
                f"data.{field}",
                value,
                f"the teacher was trained with {wanted}, and both see the same images",
                "leave data.mean, data.std and data.interpolation out: they are then the teacher's",
            )
    if ours.fit != theirs.fit:
        reason = f"the teacher was trained with {theirs.fit!r}, and both see the same images"
        raise UserError("data.fit", ours.fit, reason, f"give --data.fit {theirs.fit}")
    for field, value, wanted in (("resize", ours.resize, theirs.resize), ("crop", ours.crop, theirs.crop)):
        if value != wanted:
            raise UserError(
                f"data.{field}",
                value,
                f"the teacher was trained at {wanted}, and both see the same images",
                f"give --data.resize {theirs.resize} --data.crop {theirs.crop}",
            )


def _require_unseen(teacher: Teacher, manifest: Manifest) -> None:
    """A student measured on images whose labels its teacher has learned would look better than it is."""
    path = teacher.folder / "manifest.json"
    if not path.is_file():
        return
    trained_on = {image.digest for image in Manifest.load(path).images if image.split == "train"}
    seen = [image.path for image in manifest.images if image.split != "train" and image.digest in trained_on]
    if seen:
        raise UserError(
            "distill.teacher",
            teacher.folder,
            f"it was trained on {len(seen)} images that its students would be measured on, such as {seen[0]}",
            f"set {', '.join(SPLIT_FIELDS)} as in the teacher's recipe.yaml",
        )
