"""Optimizers by recipe, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from fpcn_dist.recipe.schema import OptimConfig


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters of ``module``.

    AdamW does not decay vectors (biases, normalisation layers); SGD decays everything, as the released code does. The
    backbone, which may thaw later than the head, has groups of its own: sharded optimizers count steps by group.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = config.name == "sgd" or parameter.ndim > 1
            groups.setdefault(("backbone" in name, decays), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
        for (_, decays), parameters in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(settings, config.lr, momentum=config.momentum)
    return torch.optim.AdamW(settings, config.lr)


def moment_names(config: OptimConfig) -> tuple[str, ...]:
    """Names of the tensors, shaped like their parameter, that the optimizer keeps."""
    if config.name == "adamw":
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if config.momentum else ()


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Rate of the update that ``step`` (counted from 0) makes: linear warm-up, then a cosine down to ``min_lr``."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
