"""However the script is started, whichever engine it uses: the same losses, the same files."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from fpcn_dist.checkpoint import read_checkpoint
from tests.launching import losses

FILES = {
    "recipe.yaml", "environment.json", "manifest.json", "metrics.jsonl", "tensorboard", "checkpoints",
    "model.safetensors", "config.json", "README.md", "evaluation.json", "report.html", "samples",
}  # fmt: skip


def test_a_run_leaves_what_it_promises(single):
    assert {path.name for path in single.iterdir()} >= FILES
    evaluation = json.loads((single / "evaluation.json").read_text())
    assert evaluation["split"] == "test"
    assert evaluation["images"] == sum(row["images"] for row in evaluation["per_class"]) > 0
    assert len(losses(single)) == 12
    state, info = read_checkpoint(single / "checkpoints/best.safetensors")
    exported = load_file(single / "model.safetensors")
    assert all((state.weights[f"model.{name}"] == tensor).all() for name, tensor in exported.items())
    assert info.accuracy is not None


@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        ("torchrun", []),
        ("deepspeed", ["--engine.name", "deepspeed", "--engine.zero-stage", "0"]),
        ("deepspeed", ["--engine.name", "deepspeed", "--engine.zero-stage", "1"]),
        ("deepspeed", ["--engine.name", "deepspeed", "--engine.zero-stage", "2"]),
        ("deepspeed", ["--engine.name", "deepspeed", "--engine.zero-stage", "3"]),
        ("torchrun", ["--train.micro-batches", "3"]),
    ],
    ids=["ddp", "zero0", "zero1", "zero2", "zero3", "ddp in 3 parts"],
)
def test_two_ranks_give_the_losses_of_one(runs, single, launcher, overrides, request):
    run = runs.train(request.node.callspec.id, *overrides, launcher=launcher)
    assert losses(run) == pytest.approx(losses(single), abs=1e-4)
    assert (json.loads((run / "evaluation.json").read_text()))["accuracy"] == pytest.approx(
        json.loads((single / "evaluation.json").read_text())["accuracy"], abs=0.101
    )
