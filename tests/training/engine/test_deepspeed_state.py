"""Every ZeRO stage gives and takes whole states: bit for bit, thawed parameters beginning from nothing."""

from __future__ import annotations

import os

import pytest
import torch

from fpcn_dist.recipe.training import Depth
from fpcn_dist.runtime.ranks import connect
from fpcn_dist.tasks import build_task
from fpcn_dist.training.engine import build_engine, forward_backward
from tests.helpers.forked import start_ranks
from tests.training.engine.test_engine import MODEL, batch, frozen_norms, recipe

pytestmark = pytest.mark.slow


def check(_: int, optim: dict, freeze: Depth) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    with connect() as ranks:
        for stage in range(4):
            engine = {"name": "deepspeed", "zero_stage": stage}
            chosen = recipe(optim=optim, engine=engine, train={"channels_last": True})
            engine = build_engine(chosen, build_task(chosen, 3), ranks, freeze=freeze)
            for step in range(2):
                forward_backward(engine, batch(step, 42), step, 1)
                engine.update(0.01)
            before = engine.state(2)
            engine.close()
            after = build_engine(chosen, build_task(chosen, 3), ranks, state=before).state(2)
            assert all(torch.equal(after.weights[name], tensor) for name, tensor in before.weights.items()), stage
            for name, moments in after.optimizer.items():
                for key, tensor in moments.items():
                    expected = before.optimizer.get(name, {}).get(key, torch.zeros_like(tensor))
                    assert torch.equal(tensor, expected), (stage, name, key)
            assert any(name.startswith("model.backbone") for name in after.optimizer) or stage == 0


@pytest.mark.parametrize(
    ("optim", "freeze"),
    [
        ({"name": "adamw"}, "backbone"),
        ({"name": "sgd"}, "backbone"),
        ({"momentum": 0.0}, "backbone"),
        ({"name": "adamw", "freeze": "stem", "layer_decay": 0.8, "head_lr": 3.0}, "stem"),
    ],
    ids=str,
)
def test_states_survive_every_stage(optim, freeze):
    start_ranks(check, optim, freeze, ranks=1)


def check_frozen_norms(_: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    with connect() as ranks:
        chosen = recipe(model=MODEL | {"norm": "frozen_batch"}, engine={"name": "deepspeed", "zero_stage": 2})
        frozen = build_engine(chosen, build_task(chosen, 3), ranks, freeze="backbone")
        forward_backward(frozen, batch(0, 42), 0, 1)
        frozen.update(0.01)
        before = frozen.state(1)
        frozen.close()
        engine = build_engine(chosen, build_task(chosen, 3), ranks, state=before)
        forward_backward(engine, batch(1, 42), 1, 1)
        engine.update(0.01)
        after = engine.state(2).weights
        changed = {name for name, tensor in before.weights.items() if not torch.equal(tensor, after[name])}
        norms = {f"{name}.{kind}" for name in frozen_norms(engine.task) for kind in ("weight", "bias")}
        assert norms and not norms & changed and "model.backbone.net.conv1.weight" in changed


def test_frozen_norms_stay_frozen_at_the_thaw():
    start_ranks(check_frozen_norms, ranks=1)
