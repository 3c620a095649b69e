"""PyTorch's DistributedDataParallel behind the engine protocol; a single rank needs no wrapper."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpcn_dist.data.batch import Batch
from fpcn_dist.models import Classifier
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.recipe.training import Depth
from fpcn_dist.runs.checkpoint import TrainingState
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.tasks import Task, TaskOutput
from fpcn_dist.training.engine.base import (
    averaged_model,
    build_ema,
    ema_state,
    named_moments,
    prepare_task,
    restore_moments,
    sync_batch_statistics,
    to_cpu,
)
from fpcn_dist.training.engine.optim import build_optimizer, set_rate


class DDPEngine:
    """See :class:`fpcn_dist.training.engine.base.Engine`.

    With one backward pass a step, DDP averages gradients while that pass still runs. With several
    (``train.micro_batches``), they are added up locally and averaged once, in :meth:`update`.
    """

    def __init__(self, task: Task, recipe: Recipe, ranks: Ranks, *, freeze: Depth, state: TrainingState | None) -> None:
        self.task = prepare_task(task, recipe, ranks, freeze, state)
        if recipe.train.channels_last:  # the weights too, or each convolution would convert them
            self.task = self.task.to(memory_format=torch.channels_last)
        self.group = ranks.group
        self.clip_norm = recipe.optim.clip_norm
        self.optimizer = build_optimizer(recipe.optim, self.task)
        self.ema = build_ema(recipe, self.task, state)
        if state is not None:
            restore_moments(self.task, self.optimizer, state.optimizer)
        # Once, as it takes longer to walk through a network than to train the head of a frozen one.
        self.parameters = [p for p in self.task.parameters() if p.requires_grad]
        self.one_pass = recipe.train.micro_batches == 1
        self.module: nn.Module = self.task
        if self.group is not None:
            with warnings.catch_warnings():  # torch 2.14 deprecates the name that 2.11 knows alone
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self.module = DistributedDataParallel(self.task, broadcast_buffers=False, gradient_as_bucket_view=True)
            if self.one_pass:
                _settle_buckets(self.module)

    def forward(self, batch: Batch, step: int, *, pooled: Tensor | None = None) -> TaskOutput:
        with self._averaging_later():
            return self.module(batch, step, pooled=pooled)

    def encode(self, batch: Batch, step: int) -> Tensor:
        with self._averaging_later():
            return self.module(batch, step, encode_only=True)

    def _averaging_later(self) -> contextlib.AbstractContextManager[None]:
        """DDP averages no gradients of a forward pass inside, where :meth:`update` is to do so."""
        if self.one_pass or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> Tensor:
        if self.group is not None and not self.one_pass:
            self._average_gradients(self.group)
        trained = [p for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(trained, self.clip_norm, norm)
        set_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.group is None)
        if self.ema is not None:
            self.ema.update_parameters(self.task.model)
        return norm

    def _average_gradients(self, group: torch.distributed.ProcessGroup) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(flat, group=group)
        flat /= group.size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def evaluation_model(self) -> Classifier:
        sync_batch_statistics(self.task, self.group)
        return averaged_model(self.ema) or self.task.model

    def state(self, step: int) -> TrainingState:
        sync_batch_statistics(self.task, self.group)
        weights, moments = to_cpu(self.task.state_dict()), named_moments(self.task, self.optimizer)
        return TrainingState(step, weights, moments, ema_state(self.ema))

    def close(self) -> None:
        self.module = self.task


def _settle_buckets(module: DistributedDataParallel) -> None:
    """Let DDP lay out its buckets before the first step. Collective.

    It sums all gradients in one bucket until a backward pass has shown in which order they come, and in several from
    then on, which rounds otherwise. The first step of a resumed run would so differ from the same step of one that
    was never interrupted. Here gradients of zero come in the order of the layers, the last one first.
    """
    module.reducer.prepare_for_forward()
    module.reducer.prepare_for_backward([])
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    torch.stack([0.0 * parameter.sum() for parameter in parameters]).sum().backward()
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.zero_()
