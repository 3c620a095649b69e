"""What the training loop asks of an engine, and the state that all engines exchange."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fpcn_dist.data.batch import Batch
from fpcn_dist.models import Classifier
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.recipe.training import Depth
from fpcn_dist.runs.checkpoint import TrainingState
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.tasks import Task, TaskOutput


class Engine(Protocol):
    """Holds a task, spreads its work over ranks, and keeps parameters, gradients and optimizer together."""

    task: Task

    def forward(self, batch: Batch, step: int, *, pooled: Tensor | None = None) -> TaskOutput:
        """Call both halves of the task; the criterion alone where the features ``pooled`` [B, C] are given."""
        ...

    def encode(self, batch: Batch, step: int) -> Tensor:
        """Call the first half of the task alone: features [B, C] of the images."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those of this step."""

    def update(self, lr: float) -> Tensor | None:
        """Average gradients over ranks, clip, step, clear; return the gradient norm, a device scalar, where known."""
        ...

    def evaluation_model(self) -> Classifier:
        """The model to evaluate (the averaged one where there is one), the same on every rank. Collective."""
        ...

    def state(self, step: int) -> TrainingState:
        """Whole state, the same on every rank. Collective."""
        ...

    def close(self) -> None:
        """Let go of what another engine could not be built beside."""


def prepare_task(task: Task, recipe: Recipe, ranks: Ranks, freeze: Depth, state: TrainingState | None) -> Task:
    """Place the task on its device, its backbone frozen so deep, with the weights of ``state`` if there is one."""
    if state is not None:
        task.load_state_dict(state.weights)
    task = task.to(ranks.device)
    task.model.backbone.freeze(freeze)
    if recipe.train.compile:
        task.model.backbone.compile()
    return task.train()


def build_ema(recipe: Recipe, task: Task, state: TrainingState | None) -> AveragedModel | None:
    """The moving average of the model's weights and buffers, where the recipe asks for one."""
    if recipe.optim.ema_decay is None:
        return None
    average = get_ema_multi_avg_fn(recipe.optim.ema_decay)
    ema = AveragedModel(task.model, multi_avg_fn=average, use_buffers=True)
    if state is not None:
        ema.load_state_dict(state.ema)
    return ema


def averaged_model(ema: AveragedModel | None) -> Classifier | None:
    """The network inside the moving average."""
    return None if ema is None else cast(Classifier, ema.module)


def ema_state(ema: AveragedModel | None) -> dict[str, Tensor]:
    return {} if ema is None else to_cpu(ema.state_dict())


def sync_batch_statistics(task: nn.Module, group: torch.distributed.ProcessGroup | None) -> None:
    """Average BatchNorm's running statistics over ranks, which no engine does: each rank has seen other images."""
    if group is None:
        return
    layers = [m for m in task.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
    if not buffers:
        return
    flat = torch.cat(buffers)
    torch.distributed.all_reduce(flat, group=group)
    flat /= group.size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean)


def to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached contiguous copies in host memory, which training will not overwrite."""
    return {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()}


def named_moments(task: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """A torch optimizer's state by parameter name, copied to the CPU."""
    state = optimizer.state
    return {name: to_cpu(state[p]) for name, p in task.named_parameters() if state.get(p)}


def restore_moments(task: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, dict[str, Tensor]]) -> None:
    """Give each trainable parameter its state back; parameters that were not trained yet start without one."""
    for name, parameter in task.named_parameters():
        if parameter.requires_grad and name in moments:
            optimizer.state[parameter] = {key: _placed(t, parameter) for key, t in moments[name].items()}


def _placed(moment: Tensor, parameter: Tensor) -> Tensor:
    """A moment in its parameter's place and memory order; step counters stay on the CPU, where torch keeps them."""
    if moment.ndim == 0:
        return moment.clone()
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
