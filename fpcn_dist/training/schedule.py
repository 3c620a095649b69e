"""Where a run stands: its steps, and at which of them it logs, evaluates and saves."""

from __future__ import annotations

from typing import NamedTuple

from fpcn_dist.recipe.schema import Recipe


class Schedule(NamedTuple):
    """Counted in steps.

    Attributes:
        batch_size: images of the global batch.
        per_epoch: steps of an epoch.
        total: of the run.
        frozen: at the start, in which the backbone does not learn.
        log_every, save_every, eval_every: between log points, checkpoints, evaluations.
    """

    batch_size: int
    per_epoch: int
    total: int
    frozen: int
    log_every: int
    save_every: int
    eval_every: int

    @classmethod
    def of(cls, recipe: Recipe, batch_size: int, per_epoch: int) -> Schedule:
        train = recipe.train
        return cls(
            batch_size, per_epoch, train.epochs * per_epoch, recipe.optim.freeze_backbone_epochs * per_epoch,
            train.log_every, train.checkpoint_every or per_epoch, train.eval_every * per_epoch,
        )  # fmt: skip

    def evaluates(self, done: int) -> bool:
        """Whether the model is evaluated after ``done`` steps."""
        return done == self.total or done % self.eval_every == 0

    def saves(self, done: int) -> bool:
        """Whether a checkpoint is due after ``done`` steps."""
        return done == self.total or done % self.save_every == 0

    def logs(self, done: int) -> bool:
        """Whether the host waits for the device after ``done`` steps."""
        return self.evaluates(done) or self.saves(done) or done % self.log_every == 0
