"""Transformers and partly frozen networks through the whole loop."""

from __future__ import annotations

import shutil

import pytest
import torch

from fpcn_dist.runs.checkpoint import read_checkpoint
from fpcn_dist.runs.model_folder import load_model
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.training.loop import train
from fpcn_dist.training.soft_labels.students import _require_seeing
from tests.helpers.distilling import ALONE, recipe
from tests.helpers.launching import losses

VIT = {"backbone": "test_vit", "norm": "batch"}


@pytest.mark.slow
def test_a_transformer_trains_with_a_region_from_start_to_report(rocks, tmp_path):
    chosen = recipe("contrast", model=VIT | {"drop_path": 0.1}, optim={"layer_decay": 0.8, "head_lr": 2.0})
    train(chosen, rocks, tmp_path / "run", ALONE)
    assert len(losses(tmp_path / "run")) == 6
    model, info = load_model(tmp_path / "run")
    assert model.backbone.has_map and info.model.drop_path == 0.1
    assert model.pool(torch.randn(1, 3, 32, 32)).mask.shape == (1, 2, 2)
    assert list((tmp_path / "run" / "samples").rglob("*.jpg")) and (tmp_path / "run" / "report.html").is_file()


def test_a_crop_that_the_network_refuses_is_said_before_the_first_step(rocks, tmp_path):
    chosen = recipe("classify", model=VIT, data={"crop": 30})
    with pytest.raises(UserError, match=r"data\.crop 30: .*should be divisible by patch size \(16\)\); use 16 or 32"):
        train(chosen, rocks, tmp_path / "run", ALONE)


def test_a_backbone_that_is_frozen_for_ever_is_the_same_at_the_end(rocks, tmp_path):
    """Its BatchNorm too, in a run that is interrupted."""
    model = {"backbone": "test_resnet", "norm": "batch"}
    chosen = recipe("classify", model=model, optim={"freeze": "backbone"})
    train(chosen, rocks, tmp_path / "run", ALONE)
    before, after = (
        read_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.safetensors")[0].weights for step in (3, 6)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.classifier.weight", "model.classifier.bias"}


@pytest.mark.slow
def test_a_stem_that_is_frozen_at_first_thaws_and_a_resumed_run_is_the_same(rocks, tmp_path):
    model = {"backbone": "test_resnet", "norm": "batch"}
    chosen = recipe("classify", model=model, optim={"freeze": "stem", "freeze_epochs": 1})
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(chosen, rocks, whole, ALONE)
    first, thaw, last = (
        read_checkpoint(whole / "checkpoints" / f"step-{step:08d}.safetensors")[0].weights for step in (2, 3, 6)
    )
    stem = {name for name in first if name.startswith(("model.backbone.net.conv1", "model.backbone.net.bn1"))}
    assert stem and all(torch.equal(first[name], thaw[name]) for name in stem)
    assert not any(torch.equal(thaw[name], last[name]) for name in stem)
    shutil.copytree(whole, again)
    for path in (again / "checkpoints").glob("*"):
        if path.name not in ("step-00000002.safetensors", "step-00000003.safetensors"):
            path.unlink()
    train(chosen, rocks, again, ALONE)
    assert losses(again) == losses(whole)
    resumed = read_checkpoint(again / "checkpoints" / "step-00000006.safetensors")[0].weights
    assert all(torch.equal(resumed[name], last[name]) for name in last)


def test_a_student_that_cannot_see_the_recipes_crop_is_named_with_crops_that_it_sees():
    with pytest.raises(
        UserError, match=r"--students test_vit: it cannot see images of 30 px .*; use 16 or 32\); leave"
    ):
        _require_seeing("test_vit", recipe("distill", model={"norm": "batch"}, data={"crop": 30}))
