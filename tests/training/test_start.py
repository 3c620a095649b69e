"""The start of a training: where its weights come from, and what is read for it."""

from __future__ import annotations

import torch

from fpcn_dist.models import build_backbone, weights
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.training.loop import train
from tests.helpers.distilling import ALONE, recipe
from tests.helpers.launching import losses


def test_pretrained_weights_are_fetched_for_the_first_step_alone(tmp_path, rocks, monkeypatch):
    """Neither the thaw of the backbone nor a resumed run needs them."""
    published = tmp_path / "published.pth"
    torch.save(build_backbone("test_resnet").net.state_dict(), published)
    chosen = recipe(
        "classify",
        model={"pretrained": str(published)},
        optim={"freeze_backbone_epochs": 1},
        train={"keep_checkpoints": 9},
    )
    fetched, fetch = [], weights.load_file
    monkeypatch.setattr(weights, "load_file", lambda *args, **options: fetched.append(fetch(*args, **options)))
    run = RunFolder(tmp_path / "run")
    train(chosen, rocks, run.path, ALONE)
    expected = losses(run.path)
    assert len(fetched) == 1

    published.unlink()
    for late in (5, 6):
        (run.checkpoints / f"step-{late:08d}.safetensors").unlink(missing_ok=True)
    train(chosen, rocks, run.path, ALONE)
    assert len(fetched) == 1 and losses(run.path) == expected
    assert run.open()[0].model.pretrained == str(published)
