"""Sections ``loss``, ``contrast`` and ``distill`` of a recipe: what its losses are made of."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator

from fpcn_dist.recipe.section import Fraction, PositiveInt, Schema


class LossConfig(Schema):
    """The cross-entropy of the tasks that classify image by image."""

    label_smoothing: Fraction = 0.0
    """Share of the target that is spread evenly over all classes; not of the contrast, whose pairs have hard labels."""


class ContrastConfig(Schema):
    """Which pairs are contrasted, and the centre loss."""

    pairs: Literal["all", "random", "shifts", "hardest"] = "all"
    """Ordered pairs of the global batch: all N^2, a random choice, those of random shifts (every image with the one s
    places after it, for each shift s), or the nearest same- and other-class images."""
    num_pairs: PositiveInt | None = None
    """Pairs per global batch for random and shifts (required; of shifts a multiple of N) and hardest (null: 2 N); of
    PCA-Net, a multiple of N (null: N)."""
    center_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Lambda of eq. 12."""
    center_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the way that a class centre moves to the batch's class mean (eq. 10: 1)."""
    center_reduction: Literal["mean", "sum"] = "mean"
    """Eq. 11 averaged over images and channels, or its literal sum."""
    margin: Annotated[float, Field(ge=0.0)] = 0.05
    """Margin of the ranking loss of the gated head."""

    @model_validator(mode="after")
    def _check(self) -> ContrastConfig:
        if self.pairs == "all" and self.num_pairs is not None:
            raise ValueError(f"num_pairs {self.num_pairs} has no meaning with pairs 'all'; use 'random' or drop it")
        return self


class DistillConfig(Schema):
    """The teacher of a student, and how much the student heeds it (eq. 13 and 14)."""

    teacher: str | None = None
    """Run folder of the teacher, or any folder with its model.safetensors and config.json."""
    teacher_sha256: str | None = None
    """Hash of the teacher's weights; found out at the start, and kept so that no other teacher takes over later."""
    teacher_mode: Annotated[Literal["bank", "online"], tyro.conf.arg(aliases=("--teacher-mode",))] = "bank"
    """bank: the teacher's logits of data.views views of each image, computed once; online: computed in each step."""
    bank: str | None = None
    """Folder of the bank; null: bank/ in the run folder. Students that share a teacher can share it."""
    temperature: Annotated[float, Field(gt=0.0)] = 2.0
    """T of eq. 13."""
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of the teacher in the loss: (1 - alpha) cross-entropy + alpha T^2 KL divergence."""
    beta: Annotated[float, Field(ge=0.0)] | None = None
    """Weight of the classes beside the label in decoupled distillation, for example 2; null: KL as in eq. 14."""
