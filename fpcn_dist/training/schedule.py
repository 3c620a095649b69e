"""Where a run stands: its steps, and at which of them it logs, evaluates and saves."""

from __future__ import annotations

from typing import NamedTuple

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.recipe.schema import Recipe


def steps_per_epoch(recipe: Recipe, manifest: Manifest) -> int:
    """Steps of an epoch, as the loader counts them."""
    images = len(manifest.ids("train"))
    return max(1, images // recipe.data.batch_size(len(manifest.classes), images))


class Schedule(NamedTuple):
    """The steps of a run.

    Attributes:
        batch_size: images of the global batch.
        per_epoch: steps of an epoch.
        total: steps of the run.
        frozen: steps at the start in which the backbone does not learn; all of them where it never thaws.
        thaw: the step from which on nothing is frozen; ``total`` where what is frozen never thaws.
        log_every, save_every, eval_every: steps between two log points, checkpoints, evaluations.
    """

    batch_size: int
    per_epoch: int
    total: int
    frozen: int
    thaw: int
    log_every: int
    save_every: int
    eval_every: int

    @classmethod
    def of(cls, recipe: Recipe, batch_size: int, per_epoch: int) -> Schedule:
        """The steps of a recipe whose epochs have ``per_epoch`` steps of ``batch_size`` images."""
        train, optim = recipe.train, recipe.optim
        epochs = train.epochs if optim.freeze_epochs is None else min(optim.freeze_epochs, train.epochs)
        thaw = 0 if optim.freeze == "none" else epochs * per_epoch
        return cls(
            batch_size,
            per_epoch,
            total=train.epochs * per_epoch,
            frozen=thaw if optim.freeze == "backbone" else 0,
            thaw=thaw,
            log_every=train.log_every,
            save_every=train.checkpoint_every or per_epoch,
            eval_every=train.eval_every * per_epoch,
        )

    def evaluates(self, done: int) -> bool:
        """Whether the model is evaluated after ``done`` steps."""
        return done == self.total or done % self.eval_every == 0

    def saves(self, done: int) -> bool:
        """Whether a checkpoint is due after ``done`` steps."""
        return done == self.total or done % self.save_every == 0

    def logs(self, done: int) -> bool:
        """Whether the host waits for the device after ``done`` steps."""
        return self.evaluates(done) or self.saves(done) or done % self.log_every == 0
