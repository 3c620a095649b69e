"""Every recipe field, its meaning, unit and bounds. The sections stand in modules of their own.

A recipe is a YAML file under :class:`Recipe`. Each field can be overridden on the command line by its dotted name
(``--optim.lr 0.02``). Fields whose meaning comes from the paper name its section or equation; ``docs/paper.md`` tells
why each default was chosen where the paper is silent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator

from fpcn_dist.recipe.data import DataConfig, DecodingBackend
from fpcn_dist.recipe.losses import ContrastConfig, DistillConfig, LossConfig
from fpcn_dist.recipe.model import ModelConfig
from fpcn_dist.recipe.preprocessing import Preprocessing
from fpcn_dist.recipe.search import Dimension, SearchConfig
from fpcn_dist.recipe.section import Schema
from fpcn_dist.recipe.training import EngineConfig, OptimConfig, TrainConfig

__all__ = [
    "ContrastConfig",
    "DataConfig",
    "DecodingBackend",
    "Dimension",
    "DistillConfig",
    "EngineConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "Schema",
    "SearchConfig",
    "Task",
    "TrainConfig",
]

Task = Literal["contrast", "classify", "distill", "bilinear_cnn", "pca_net", "mmal_net"]


class Recipe(Schema):
    """Everything that decides what a run computes."""

    name: str = "fpcn"
    """Name of the recipe; names the default run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything random: split, batches, views, initial weights, dropout, random pairs."""
    task: Task = "contrast"
    """contrast: FPCN; classify: the plain classifier with the same backbone, its baseline; distill: that classifier as
    the student of a teacher; bilinear_cnn, pca_net, mmal_net: compared networks (docs/compared.md)."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    contrast: ContrastConfig = ContrastConfig()
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    search: Annotated[SearchConfig, tyro.conf.Suppress, tyro.conf.Fixed] = SearchConfig()

    def with_preprocessing(self, own: Preprocessing) -> Recipe:
        """The same with the values of ``own`` for what it leaves to the network."""
        return self.changed(data=self.data.settled(own))

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.model.head == "gated" and self.contrast.pairs != "hardest":
            raise ValueError(
                f"model.head 'gated' is defined on the hardest pairs only, not {self.contrast.pairs!r}; "
                "set contrast.pairs to 'hardest'"
            )
        for rule in _TASK_RULES[self.task]:
            rule(self)
        if self.data.images_per_class is None and self.engine.name != "ddp":
            raise ValueError(
                f"data.images_per_class null (all images in a batch) needs engine.name 'ddp', not {self.engine.name!r}"
            )
        if self.optim.ema_decay is not None and self.engine.zero_stage == 3:
            raise ValueError(
                f"optim.ema_decay {self.optim.ema_decay} needs whole weights on each rank, which engine.zero_stage 3 "
                "shards; use zero_stage 2 or drop ema_decay"
            )
        return self


def _check_pairs_are_counted(recipe: Recipe) -> None:
    if recipe.contrast.pairs in ("random", "shifts") and recipe.contrast.num_pairs is None:
        raise ValueError(
            f"contrast.pairs {recipe.contrast.pairs!r} needs contrast.num_pairs; set it to the number of pairs per "
            "global batch"
        )


def _check_labels_are_hard(recipe: Recipe) -> None:
    if recipe.loss.label_smoothing:
        raise ValueError(
            f"loss.label_smoothing {recipe.loss.label_smoothing} has no meaning with task 'contrast', whose loss over "
            "pairs takes each label as certain; set it to 0, or train with task 'classify'"
        )


def _check_pairs_are_random(recipe: Recipe) -> None:
    if recipe.contrast.pairs != "random":
        raise ValueError(
            f"task {recipe.task!r} draws its pairs at random, but contrast.pairs is {recipe.contrast.pairs!r}; "
            "set it to 'random'"
        )


def _check_views_of_the_bank(recipe: Recipe) -> None:
    if recipe.distill.teacher_mode == "bank" and recipe.data.views is None:
        raise ValueError(
            "distill.teacher_mode 'bank' needs data.views, the number of views of each image that it holds; set it "
            "(16, say), or use 'online'"
        )


def _check_images_are_not_mixed(recipe: Recipe) -> None:
    augment = recipe.data.augment
    if augment.mixes:
        name = "mixup" if augment.mixup else "cutmix"
        why = "contrasts pairs by their classes" if recipe.task in ("contrast", "pca_net") else "looks for one object"
        raise ValueError(
            f"data.augment.{name} {getattr(augment, name)} mixes images, but task {recipe.task!r} {why}; set it to 0, "
            "or use task 'classify'"
        )


def _check_regions_can_be_looked_up(recipe: Recipe) -> None:
    region, wanted = recipe.data.augment.region, ""
    if region == "none":
        return
    if recipe.model.region == "none":
        wanted = "finds no region with model.region 'none'; set that to 'threshold' or 'largest'"
    elif recipe.data.fit == "short_side":
        wanted = "must know what part of an image a view shows, but data.fit is 'short_side'; use 'squeeze' or 'pad'"
    elif recipe.data.augment.policy != "none":
        wanted = "needs images that are not turned or sheared, as data.augment.policy does; set that to 'none'"
    elif recipe.data.views == 1:
        wanted = "changes every other view, but data.views is 1; raise it to 2 or more, or set it to null"
    elif recipe.train.micro_batches > 1:
        wanted = (
            f"follows masks from step to step, but train.micro_batches {recipe.train.micro_batches} computes each of "
            "them twice; set that to 1"
        )
    if wanted:
        raise ValueError(f"data.augment.region {region!r} {wanted}")


def _check_no_regions(recipe: Recipe) -> None:
    region = recipe.data.augment.region
    if region != "none":
        raise ValueError(
            f"data.augment.region {region!r} needs the region of FPCN, which task {recipe.task!r} does not look for; "
            "set it to 'none', or task to 'contrast'"
        )


def _check_a_bank_can_hold_the_views(recipe: Recipe) -> None:
    augment = recipe.data.augment
    if recipe.distill.teacher_mode == "bank" and augment.mixes:
        name = "mixup" if augment.mixup else "cutmix"
        raise ValueError(
            f"data.augment.{name} {getattr(augment, name)} mixes the images of a batch, of which "
            "distill.teacher_mode 'bank' holds no logits; use 'online', or set it to 0"
        )


def _check_classes_weigh_the_same(recipe: Recipe) -> None:
    weights = recipe.data.class_weights
    if weights != "none":
        raise ValueError(
            f"data.class_weights {weights!r} weighs the cross-entropy of images, which is not all that task "
            f"{recipe.task!r} minimises; set it to 'none'"
        )


def _check_decoupled_labels_are_hard(recipe: Recipe) -> None:
    augment = recipe.data.augment
    if recipe.distill.beta is not None and augment.mixes:
        name = "mixup" if augment.mixup else "cutmix"
        raise ValueError(
            f"distill.beta {recipe.distill.beta} sets one label of an image apart, but data.augment.{name} "
            f"{getattr(augment, name)} gives it two; set that to 0, or drop distill.beta"
        )


# What each task asks of a recipe. Its network stands in fpcn_dist.models.NETWORKS, its losses in fpcn_dist.tasks.TASKS.
_TASK_RULES: dict[Task, tuple[Callable[[Recipe], None], ...]] = {
    "contrast": (
        _check_pairs_are_counted,
        _check_labels_are_hard,
        _check_images_are_not_mixed,
        _check_classes_weigh_the_same,
        _check_regions_can_be_looked_up,
    ),
    "classify": (_check_pairs_are_counted, _check_no_regions),
    "distill": (
        _check_pairs_are_counted,
        _check_views_of_the_bank,
        _check_a_bank_can_hold_the_views,
        _check_decoupled_labels_are_hard,
        _check_no_regions,
    ),
    "bilinear_cnn": (_check_pairs_are_counted, _check_no_regions),
    "pca_net": (
        _check_pairs_are_random,
        _check_images_are_not_mixed,
        _check_classes_weigh_the_same,
        _check_no_regions,
    ),
    "mmal_net": (
        _check_pairs_are_counted,
        _check_images_are_not_mixed,
        _check_classes_weigh_the_same,
        _check_no_regions,
    ),
}
