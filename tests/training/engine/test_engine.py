"""Engines on one rank: gradient accumulation, averaging of weights, states that fit each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fpcn_dist.data.batch import Batch
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import TrainingState
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.tasks import build_task
from fpcn_dist.training.engine import build_engine, forward_backward

RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))
MODEL = {"backbone": "resnet18", "pretrained": False, "norm": "group", "hidden": 16}


def recipe(**sections) -> Recipe:
    return Recipe.model_validate({"model": MODEL, "data": {"resize": 32, "crop": 32}} | sections)


def batch(seed: int = 0, images: int = 12, classes: int = 3) -> Batch:
    torch.manual_seed(seed)
    ids = torch.arange(images)
    return Batch(torch.randn(images, 3, 32, 32), ids % classes, ids, ids, torch.zeros(images, 3, dtype=torch.int64))


def engine_for(recipe: Recipe, **options):
    return build_engine(recipe, build_task(recipe, 3), RANKS, **options)


def gradients(recipe: Recipe, parts: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    engine = engine_for(recipe)
    engine.task.double()
    data = batch()
    data = Batch(data.images.double(), data.labels, data.image_ids, data.view_ids, data.crops)
    output = forward_backward(engine, data, 5, parts)
    return output.loss.detach(), {name: p.grad for name, p in engine.task.named_parameters()}


@pytest.mark.parametrize("parts", [2, 3, 12])
@pytest.mark.parametrize(
    "sections",
    [
        {"task": "classify"},
        {"task": "contrast"},
        {"contrast": {"pairs": "random", "num_pairs": 50}, "model": MODEL | {"dropout": 0.3}},
        {"contrast": {"pairs": "hardest"}, "model": MODEL | {"head": "gated"}},
    ],
    ids=["classify", "all pairs", "random pairs and dropout", "gated"],
)
def test_accumulation_changes_neither_loss_nor_gradients(sections, parts):
    loss, whole = gradients(recipe(**sections), 1)
    loss_in_parts, in_parts = gradients(recipe(**sections), parts)
    torch.testing.assert_close(loss_in_parts, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_parts, whole, rtol=1e-9, atol=1e-12)


def test_accumulation_counts_each_image_once_in_the_running_statistics():
    """With feature caching, images pass BatchNorm twice; its statistics must be those of one pass over the parts."""
    model = MODEL | {"norm": "batch"}
    engine = engine_for(recipe(model=model))
    reference = engine_for(recipe(model=model))
    for part in batch().split(3):
        reference.task(part, 0, encode_only=True)
    forward_backward(engine, batch(), 0, 3)
    buffers, expected = dict(engine.task.model.named_buffers()), dict(reference.task.model.named_buffers())
    means = [name for name in buffers if name.endswith(("running_mean", "running_var"))]
    assert means
    for name in means:
        torch.testing.assert_close(buffers[name], expected[name])


def steps(engine, first: int, count: int) -> list[float]:
    found = []
    for step in range(first, first + count):
        output = forward_backward(engine, batch(step), step, 1)
        engine.update(lr=0.05)
        found.append(output.loss.item())
    return found


@pytest.mark.parametrize("optim", [{"name": "sgd"}, {"name": "adamw"}, {"ema_decay": 0.5}, {"clip_norm": 0.1}])
def test_a_state_continues_bit_for_bit(optim):
    chosen = recipe(optim=optim, model=MODEL | {"norm": "batch"})
    uninterrupted = engine_for(chosen)
    expected = steps(uninterrupted, 0, 4)
    first = engine_for(chosen)
    start = steps(first, 0, 2)
    second = engine_for(chosen, state=first.state(2))
    assert start + steps(second, 2, 2) == expected
    a, b = uninterrupted.evaluation_model().state_dict(), second.evaluation_model().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_moving_average_follows_the_weights():
    engine = engine_for(recipe(optim={"ema_decay": 0.9}))
    before = engine.task.model.classifier.weight.detach().clone()
    steps(engine, 0, 1)
    first = engine.task.model.classifier.weight.detach().clone()
    steps(engine, 1, 1)
    second = engine.task.model.classifier.weight.detach().clone()
    assert not torch.equal(before, first) and not torch.equal(first, second)
    average = engine.evaluation_model().classifier.weight
    torch.testing.assert_close(average, 0.9 * first + 0.1 * second)


def test_a_frozen_backbone_stays_and_thaws():
    chosen = recipe()
    frozen = engine_for(chosen, freeze="backbone")
    before = frozen.state(0).weights
    steps(frozen, 0, 2)
    state = frozen.state(2)
    changed = {name for name in before if not torch.equal(before[name], state.weights[name])}
    assert changed and not any(name.startswith("model.backbone") for name in changed)
    thawed = engine_for(chosen, state=state)
    steps(thawed, 2, 1)
    after = thawed.state(3)
    assert any(
        name.startswith("model.backbone") and not torch.equal(tensor, state.weights[name])
        for name, tensor in after.weights.items()
    )
    assert isinstance(after, TrainingState) and set(state.optimizer) < set(after.optimizer)


@pytest.mark.parametrize("freeze", ["none", "stem", "backbone"])
def test_frozen_norms_never_learn(freeze):
    """Their scales and shifts neither, whether the backbone learns from the start or thaws."""
    chosen = recipe(model=MODEL | {"norm": "frozen_batch"})
    engine = engine_for(chosen, freeze=freeze)
    if freeze != "none":
        engine = engine_for(chosen, state=engine.state(0))
    before = engine.state(0).weights
    steps(engine, 0, 2)
    after = engine.state(2)
    norms = {f"{name}.{kind}" for name in frozen_norms(engine.task) for kind in ("weight", "bias", "running_mean")}
    assert norms < before.keys() and not norms & after.optimizer.keys()
    assert all(torch.equal(before[name], after.weights[name]) for name in norms)
    assert not torch.equal(before["model.backbone.net.conv1.weight"], after.weights["model.backbone.net.conv1.weight"])


def frozen_norms(task: nn.Module) -> list[str]:
    return [name for name, layer in task.named_modules() if isinstance(layer, nn.BatchNorm2d)]


def test_clipping_bounds_the_update():
    engine = engine_for(recipe(optim={"clip_norm": 0.01, "momentum": 0.0, "weight_decay": 0.0}))
    before = torch.cat([p.detach().flatten().clone() for p in engine.task.parameters()])
    forward_backward(engine, batch(), 0, 1)
    norm = engine.update(lr=1.0)
    after = torch.cat([p.detach().flatten() for p in engine.task.parameters()])
    assert norm > 0.01
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)
