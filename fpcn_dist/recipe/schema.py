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


# What each task asks of a recipe. Its network stands in fpcn_dist.models.NETWORKS, its losses in fpcn_dist.tasks.TASKS.
_TASK_RULES: dict[Task, tuple[Callable[[Recipe], None], ...]] = {
    "contrast": (_check_pairs_are_counted, _check_labels_are_hard),
    "classify": (_check_pairs_are_counted,),
    "distill": (_check_pairs_are_counted, _check_views_of_the_bank),
    "bilinear_cnn": (_check_pairs_are_counted,),
    "pca_net": (_check_pairs_are_random,),
    "mmal_net": (_check_pairs_are_counted,),
}
