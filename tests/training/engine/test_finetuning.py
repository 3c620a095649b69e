"""Learning rates by depth and of the head, label smoothing, and old models of tokens."""

from __future__ import annotations

import dataclasses
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from timm.optim import param_groups_layer_decay

from fpcn_dist.models import Classifier
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import CheckpointInfo, require_same_recipe
from fpcn_dist.runs.model_folder import load_model, save_model
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.tasks import build_task
from fpcn_dist.training.engine import build_engine, forward_backward
from fpcn_dist.training.engine.optim import build_optimizer, set_rate
from tests.training.engine.test_engine import MODEL, RANKS, batch, engine_for, recipe


def scales(chosen: Recipe) -> dict[str, float]:
    """The multiple of the rate that each parameter learns at, by its name."""
    task = build_task(chosen, 3)
    names = {id(parameter): name.removeprefix("model.") for name, parameter in task.named_parameters()}
    groups = build_optimizer(chosen.optim, task).param_groups
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_layer_decay_is_timms(name):
    whole = timm.create_model(name, num_classes=3)
    names = {id(parameter): key for key, parameter in whole.named_parameters()}
    groups = param_groups_layer_decay(whole, layer_decay=0.5)
    expected = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    model = {"backbone": name, "pretrained": False}
    found = scales(recipe(task="classify", model=model, optim={"name": "adamw", "layer_decay": 0.5}))
    backbone = {key.removeprefix("backbone.net."): s for key, s in found.items() if key.startswith("backbone.")}
    assert backbone == pytest.approx({key: expected[key] for key in backbone})
    assert len(set(backbone.values())) > 3 and found["classifier.weight"] == 1.0


def test_layer_decay_of_a_resnet_goes_by_its_blocks():
    found = scales(recipe(model=MODEL, optim={"layer_decay": 0.5, "head_lr": 10.0}))
    assert found["backbone.net.conv1.weight"] == found["backbone.net.bn1.weight"] == 0.5**9
    assert found["backbone.net.layer1.0.conv1.weight"] == 0.5**8
    assert found["backbone.net.layer4.1.conv2.weight"] == 0.5
    assert {s for key, s in found.items() if not key.startswith("backbone.")} == {10.0}


def test_usually_everything_learns_at_one_rate_in_two_groups():
    chosen = recipe()
    optimizer = build_optimizer(chosen.optim, build_task(chosen, 3))
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize("freeze", ["none", "stem"])
def test_a_step_is_as_long_as_its_group_says(freeze):
    optim = {"momentum": 0.0, "weight_decay": 0.0, "layer_decay": 0.5, "head_lr": 3.0, "freeze": freeze}
    engine = engine_for(recipe(optim=optim))
    before = {name: p.detach().clone() for name, p in engine.task.named_parameters()}
    forward_backward(engine, batch(), 0, 1)
    gradients = {name: p.grad.clone() for name, p in engine.task.named_parameters()}
    engine.update(lr=0.1)
    for name, scale in (
        ("model.backbone.net.conv1.weight", 0.5**9),
        ("model.backbone.net.layer4.1.conv1.weight", 0.5),
        ("model.classifier.weight", 3.0),
    ):
        moved = dict(engine.task.named_parameters())[name] - before[name]
        torch.testing.assert_close(moved, -0.1 * scale * gradients[name], rtol=1e-3, atol=1e-8)


def test_the_schedule_scales_every_group():
    chosen = recipe(optim={"head_lr": 4.0})
    optimizer = build_optimizer(chosen.optim, build_task(chosen, 3))
    for rate in (0.5, 0.25):
        set_rate(optimizer, rate)
        assert sorted({group["lr"] for group in optimizer.param_groups}) == [rate, 4 * rate]


def test_a_stem_that_thaws_goes_on_from_its_checkpoint():
    chosen = recipe(optim={"name": "adamw", "freeze": "stem", "freeze_epochs": 1, "layer_decay": 0.9})
    engine = engine_for(chosen, freeze="stem")
    for step in range(2):
        forward_backward(engine, batch(step), step, 1)
        engine.update(0.01)
    state = engine.state(2)
    assert not any(name.startswith(("model.backbone.net.conv1", "model.backbone.net.bn1")) for name in state.optimizer)
    assert any(name.startswith("model.backbone.net.layer1") for name in state.optimizer)
    thawed = build_engine(chosen, build_task(chosen, 3), RANKS, state=state)
    forward_backward(thawed, batch(2), 2, 1)
    thawed.update(0.01)
    name = "model.backbone.net.conv1.weight"
    assert not torch.equal(thawed.state(3).weights[name], state.weights[name])


# --- label smoothing --------------------------------------------------------------------------------------------------


def test_label_smoothing_of_the_plain_classifier_is_that_of_torch():
    task = build_task(recipe(task="classify", loss={"label_smoothing": 0.2}), 3)
    pooled, data = torch.randn(12, 512), batch()
    expected = F.cross_entropy(task.model.logits(pooled), data.labels, label_smoothing=0.2)
    assert task.criterion(pooled, data, 0).loss.item() == pytest.approx(expected.item())
    assert expected.item() != pytest.approx(F.cross_entropy(task.model.logits(pooled), data.labels).item())


def test_label_smoothing_of_a_student_is_of_the_hard_part_alone():
    pooled, teacher, losses = torch.randn(12, 512), torch.randn(12, 3), []
    data = dataclasses.replace(batch(), teacher_logits=teacher)
    for smoothing in (0.0, 0.1):
        distill = {"teacher": "run", "teacher_mode": "online", "alpha": 0.25}
        task = build_task(recipe(task="distill", distill=distill, loss={"label_smoothing": smoothing}), 3)
        losses.append(task.criterion(pooled, data, 0).loss)
        logits = task.model.logits(pooled)
    difference = F.cross_entropy(logits, data.labels, label_smoothing=0.1) - F.cross_entropy(logits, data.labels)
    torch.testing.assert_close(losses[1] - losses[0], 0.75 * difference)


def test_the_contrast_refuses_label_smoothing():
    with pytest.raises(
        ValidationError, match=r"loss.label_smoothing 0.1 has no meaning with task 'contrast'.*set it to 0"
    ):
        recipe(loss={"label_smoothing": 0.1})


# --- models of before -------------------------------------------------------------------------------------------------


def dated(folder, backbone: str) -> Recipe:
    """A run folder as it was written before tokens were a map."""
    chosen = recipe(task="classify", model={"backbone": backbone, "pretrained": False})
    save_model(folder, Classifier(backbone, 3), chosen, ["a", "b", "c"])
    config = json.loads((folder / "config.json").read_text())
    del config["model"]["drop_path"]
    (folder / "config.json").write_text(json.dumps(config))
    return chosen


def test_an_old_model_of_tokens_is_refused_and_others_load(tmp_path):
    dated(tmp_path, "resnet18")
    load_model(tmp_path)
    dated(tmp_path, "test_vit")
    with pytest.raises(UserError, match=r"config.json.*: dates from when networks of tokens were .*; train it again"):
        load_model(tmp_path)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_an_old_checkpoint_of_tokens_is_refused_and_others_resume(tmp_path, backbone):
    chosen = dated(tmp_path, backbone)
    written = chosen.model_dump()
    require_same_recipe(chosen, CheckpointInfo(3, written, "hash", ("a", "b", "c")), tmp_path)
    del written["model"]["drop_path"]
    older = CheckpointInfo(3, written, "hash", ("a", "b", "c"))
    if backbone == "test_resnet":
        require_same_recipe(chosen, older, tmp_path)
        return
    with pytest.raises(UserError, match=r"checkpoint.*: dates from when networks of tokens were"):
        require_same_recipe(chosen, older, tmp_path)
