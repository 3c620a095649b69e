"""One step's gradients, from one pass or from several small ones, with the same loss either way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpcn_dist.data.batch import Batch
from fpcn_dist.tasks import TaskOutput
from fpcn_dist.training.engine.base import Engine


def forward_backward(engine: Engine, batch: Batch, step: int, micro_batches: int) -> TaskOutput:
    """Loss of ``batch`` and its gradients, never holding the activations of more than 1/``micro_batches`` of it.

    A loss that is a mean over images adds up part by part. A loss that couples images does not: their features are
    computed first, without activations; the criterion runs once, over all of them; then each part is computed again
    and its features' gradient sent through it (gradient caching, Gao et al. 2021). That costs one more forward pass
    and is exact, up to the batch statistics of BatchNorm, which are those of a part.

    ``micro_batches`` must divide the batch.
    """
    if micro_batches == 1:
        output = engine.forward(batch, step)
        engine.backward(output.loss)
        return output
    parts = batch.split(micro_batches)
    if engine.task.couples_images:
        return _cached(engine, batch, parts, step)
    outputs: list[TaskOutput] = []
    for part in parts:
        outputs.append(engine.forward(part, step))
        engine.backward(outputs[-1].loss / len(parts))
    loss = torch.stack([output.loss.detach() for output in outputs]).mean()
    means = {name: torch.stack([output.parts[name] for output in outputs]).mean() for name in outputs[0].parts}
    return TaskOutput(loss, torch.cat([output.logits for output in outputs]), means)


def _cached(engine: Engine, batch: Batch, parts: list[Batch], step: int) -> TaskOutput:
    if batch.pooled is not None:
        output = engine.forward(batch, step)
        engine.backward(output.loss)
        return output
    with torch.no_grad(), _running_statistics_kept(engine.task):
        features = [engine.encode(part, step) for part in parts]
    pooled = torch.cat(features).requires_grad_()
    output = engine.forward(batch, step, pooled=pooled)
    engine.backward(output.loss)
    if engine.task.encodes_views and engine.task.model.backbone.frozen == "backbone":
        return output
    assert pooled.grad is not None
    for part, gradient in zip(parts, pooled.grad.split([len(part) for part in parts]), strict=True):
        features_again = engine.encode(part, step)
        if features_again.requires_grad:  # else the whole backbone is frozen
            engine.backward((features_again * gradient).sum())
    return TaskOutput(output.loss.detach(), output.logits, output.parts)


@contextlib.contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch as in training, but does not count this pass in its running statistics."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
