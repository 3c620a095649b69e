"""Options that change the course of a run, through the real command: thawing, averaging, profiling, bad files."""

from __future__ import annotations

import json
import subprocess
import time

import pytest

from fpcn_dist.runs.checkpoint import read_checkpoint
from tests.helpers.launching import command, environment, losses

EVERYTHING = (
    "--optim.name",
    "adamw",
    "--optim.lr",
    "0.0003",
    "--optim.freeze",
    "backbone",
    "--optim.freeze-epochs",
    "2",
    "--optim.ema-decay",
    "0.8",
    "--optim.clip-norm",
    "0.5",
    "--contrast.pairs",
    "random",
    "--contrast.num-pairs",
    "60",
    "--model.dropout",
    "0.2",
    "--model.backbone",
    "resnet18",
    "--model.region",
    "largest",
    "--model.companion",
    "True",
    "--model.theta",
    "0.1",
)


@pytest.fixture(scope="module")
def everything(runs):
    return runs.train("everything", *EVERYTHING)


def test_the_backbone_thaws_on_time(everything):
    def backbone(step: int) -> dict:
        state, _ = read_checkpoint(everything / f"checkpoints/step-{step:08d}.safetensors")
        return {k: v for k, v in state.weights.items() if k.startswith("model.backbone") and k.endswith("weight")}

    frozen, thawed = backbone(6), backbone(8)
    untrained = {name for name in frozen if (frozen[name] == thawed[name]).all()}
    assert untrained == {name for name in frozen if ".bn" in name or ".downsample.1." in name}  # norm: frozen_batch


@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        ("torchrun", ["--train.micro-batches", "2"]),
        ("deepspeed", ["--engine.name", "deepspeed", "--engine.zero-stage", "2", "--train.micro-batches", "2"]),
    ],
    ids=["ddp", "zero2"],
)
def test_all_options_together_on_two_ranks(runs, everything, launcher, overrides, request):
    run = runs.train(f"everything, {request.node.callspec.id}", *EVERYTHING, *overrides, launcher=launcher)
    # Of 10^5 activations a step, some are within rounding of zero: a relu that falls on its other side changes what
    # AdamW does with the gradient, but neither the losses with a frozen backbone nor the first one after the thaw.
    assert losses(run)[:7] == pytest.approx(losses(everything)[:7], abs=1e-5)
    assert losses(run) == pytest.approx(losses(everything), abs=2e-3)
    ours, theirs = (read_checkpoint(r / "checkpoints/step-00000012.safetensors")[0] for r in (run, everything))
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    assert {k: v.keys() for k, v in ours.optimizer.items()} == {k: v.keys() for k, v in theirs.optimizer.items()}


def test_gated_head_and_plain_classifier(runs):
    gated = runs.train("gated", "--model.head", "gated", "--contrast.pairs", "hardest", "--train.epochs", "1")
    plain = runs.train("plain", "--task", "classify", "--train.epochs", "1")
    assert len(losses(gated)) == len(losses(plain)) == 3


def test_bf16_channels_last_and_compile(runs, single):
    overrides = ("--train.precision", "bf16", "--train.channels-last", "True", "--train.compile", "True")
    run = runs.train("bf16", *overrides, "--train.epochs", "1")
    assert losses(run) == pytest.approx(losses(single)[:3], abs=0.05)


def test_profile(runs):
    run = runs.train("profile", "--profile", "True")
    assert "traceEvents" in json.loads((run / "profile/rank0.json").read_text())


def test_a_file_that_goes_bad_is_replaced_and_reported(runs, tmp_path):
    import shutil

    data = tmp_path / "rocks"
    shutil.copytree(runs.data, data)
    output = tmp_path / "run"
    argv = [*command("python"), *runs.train_argv(output, "--train.epochs", "60", data=data)]
    process = subprocess.Popen(
        argv, env=environment(), cwd=runs.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (output / "metrics.jsonl").exists() or '"step": 3' not in (output / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    manifest = json.loads((output / "manifest.json").read_text())
    victim = next(image for image in manifest["images"] if image[2] == "train")
    (data / victim[0]).write_bytes(b"")
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 0, shown
    assert shown.count("another image is shown in its place") == 1
    assert victim[0].split("/")[-1] in (output / "report.html").read_text()
