"""Optimizers by recipe, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from fpcn_dist.config import OptimConfig


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters of ``module``.

    AdamW does not decay vectors (biases, normalisation layers); SGD decays everything, as the released code does.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if config.name == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], config.lr)


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Rate of the update that ``step`` (counted from 0) makes: linear warm-up, then a cosine down to ``min_lr``."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
