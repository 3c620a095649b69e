"""Optimizers by recipe, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fpcn_dist.models import Backbone
from fpcn_dist.models.depth import layer_depths
from fpcn_dist.recipe.schema import OptimConfig


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters of ``module``, a task.

    AdamW does not decay vectors (biases, normalisation layers); SGD decays everything, as the released code does. What
    thaws later than the rest has groups of its own: sharded optimizers count steps by group. The multiple of the
    learning rate that a group has is its ``"lr_scale"``; :func:`set_rate` heeds it.
    """
    groups: dict[tuple[int, float, bool], list[nn.Parameter]] = {}
    parts = _parts(config, module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = config.name == "sgd" or parameter.ndim > 1
            groups.setdefault((*parts[name], decays), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": scale}
        for (_, scale, decays), parameters in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(settings, config.lr, momentum=config.momentum)
    return torch.optim.AdamW(settings, config.lr)


def set_rate(optimizer: Any, lr: float) -> None:
    """Let the next step be made at the rate ``lr`` of the schedule, times each group's own multiple."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


_HEAD, _STEM, _BODY = range(3)


def _parts(config: OptimConfig, module: nn.Module) -> dict[str, tuple[int, float]]:
    """The part of the network that each parameter belongs to, by its name, and its multiple of the rate.

    With ``layer_decay`` d, group i of a backbone of n layer groups has d^(n - i), as BEiT (Bao et al., 2022) and timm.
    """
    parts = {name: (_HEAD, config.head_lr) for name, _ in module.named_parameters()}
    for prefix, backbone in module.named_modules():
        if not isinstance(backbone, Backbone):
            continue
        depths, head = layer_depths(backbone.net)
        decay = 1.0 if config.layer_decay is None else config.layer_decay
        for name, depth in depths.items():
            part = _STEM if config.freeze == "stem" and depth == 0 else _BODY
            parts[f"{prefix}.net.{name}"] = (part, decay ** (head - depth))
    return parts


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
