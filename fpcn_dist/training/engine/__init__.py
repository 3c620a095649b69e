"""Engines: who moves tensors between ranks."""

from __future__ import annotations

from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.recipe.training import Depth
from fpcn_dist.runs.checkpoint import TrainingState
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.tasks import Task
from fpcn_dist.training.engine.accumulate import forward_backward
from fpcn_dist.training.engine.base import Engine
from fpcn_dist.training.engine.ddp import DDPEngine

__all__ = ["Engine", "build_engine", "forward_backward"]


def build_engine(
    recipe: Recipe, task: Task, ranks: Ranks, *, freeze: Depth = "none", state: TrainingState | None = None
) -> Engine:
    """The recipe's engine around ``task``, frozen so deep, starting from ``state`` where one is given.

    A state fits whichever engine and number of ranks wrote it. Collective.
    """
    if recipe.engine.name == "deepspeed":
        from fpcn_dist.training.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(task, recipe, ranks, freeze=freeze, state=state)
    return DDPEngine(task, recipe, ranks, freeze=freeze, state=state)
