"""Optimizers and the schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from fpcn_dist.recipe.schema import OptimConfig
from fpcn_dist.runtime.keys import key
from fpcn_dist.training.engine.optim import build_optimizer, learning_rate


def test_schedule():
    config = OptimConfig(lr=0.4, warmup_epochs=2, min_lr=0.1)
    rates = [learning_rate(config, step, steps_per_epoch=5, total_steps=30) for step in range(30)]
    assert rates[:10] == pytest.approx([0.04 * (k + 1) for k in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[20] == pytest.approx(0.25)
    assert rates[29] == pytest.approx(0.1 + 0.3 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_adamw_spares_vectors_and_frozen_parameters_are_left_out():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    optimizer = build_optimizer(OptimConfig(name="adamw", weight_decay=0.3), module)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {module[0].weight: 0.3, module[0].bias: 0.0, module[1].weight: 0.0, module[1].bias: 0.0}


def test_sgd_makes_the_update_of_its_definition():
    parameter = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01), parameter)
    weight, velocity = parameter.weight.item(), 0.0
    for gradient in (1.0, -0.5):
        parameter.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.01 * weight
        weight -= 0.1 * velocity
    assert parameter.weight.item() == pytest.approx(weight)


def test_keys_differ_in_every_part():
    keys = {key(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)}
    assert len(keys) == 5 * 50 * 4
    assert all(0 <= k < 2**63 for k in keys)
    assert key(1, 2) == key(1, 2)
