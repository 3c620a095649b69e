"""Training on features that were computed once: the very losses of a run that computes them in every step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fpcn_dist.data import loader
from fpcn_dist.models import build_backbone
from fpcn_dist.models.backbones import TimmNet
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.training.loop import train, train_together
from tests.helpers.distilling import ALONE, make_teacher, recipe
from tests.helpers.launching import losses


def frozen(task: str = "contrast", *, epochs: int = 4, of: int = 4, **sections: Any) -> Recipe:
    """``epochs`` frozen ones of 3 steps of 12 images; 42 images x 2 views, all of which are shown within 7 steps."""
    sections["model"] = {"norm": "batch"} | sections.get("model", {})
    sections["train"] = {"epochs": of} | sections.get("train", {})
    freeze = {"freeze": "backbone", "freeze_epochs": epochs} if epochs else {"freeze": "stem"}
    sections["optim"] = freeze | {"lr": 0.05} | sections.get("optim", {})
    return recipe(task, **sections)


def trained(chosen: Recipe, data: Path, folder: Path) -> tuple[list, list, bytes]:
    train(chosen, data, folder, ALONE)
    evaluations = [
        (line["step"], line["loss"], line["accuracy"]) for line in read_metrics(folder) if line["kind"] == "eval"
    ]
    return losses(folder), evaluations, (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "chosen",
    [
        frozen(model={"dropout": 0.2}),
        frozen(epochs=3, optim={"ema_decay": 0.9, "name": "adamw"}),
        frozen(contrast={"pairs": "hardest"}, model={"head": "gated", "region": "none"}, train={"micro_batches": 2}),
        frozen("classify", epochs=3, train={"micro_batches": 3}, model={"region": "none"}),
        frozen("bilinear_cnn"),
        frozen(data={"resize": 32, "flip": False, "views": None}, model={"region": "largest"}),
        frozen(data={"classes_per_batch": None, "images_per_class": None}, epochs=12, of=13),
    ],
    ids=["contrast", "thaw", "gated", "classify, thaw", "bilinear", "one view", "all images at once, thaw"],
)
def test_losses_are_those_of_a_run_that_computes_features_in_every_step(chosen, rocks, tmp_path):
    stored = trained(chosen, rocks, tmp_path / "stored")
    computed = trained(chosen.changed(**{"train.feature_bank": False}), rocks, tmp_path / "computed")
    assert (tmp_path / "stored/features/train/features.f32").is_file()
    assert not (tmp_path / "computed/features").exists()
    assert stored == computed
    assert len(stored[0]) >= 12 and len(set(stored[0])) > 3


def test_neither_images_nor_backbone_are_looked_at_while_it_is_frozen(rocks, tmp_path, monkeypatch):
    decoded, seen, decode, forward = [], [], loader._decode, TimmNet.forward

    def count(requests, *rest):
        return decode((decoded.append(len(request.blobs)) or request for request in requests), *rest)

    monkeypatch.setattr(loader, "_decode", count)
    monkeypatch.setattr(TimmNet, "forward", lambda net, images: seen.append(len(images)) or forward(net, images))
    train(frozen(model={"region": "none"}), rocks, tmp_path / "run", ALONE)
    once = 7 * [12] + [15]  # 42 images x 2 views, and 15 of validation; 15 of testing at the end
    first = 4 * 12  # a batch that a start decodes before it changes anything, and those that are in flight then
    assert sum(decoded) == first + sum(once) + 15 and seen[:8] == once and sum(seen) >= sum(once) + 15
    before = len(decoded)
    train(
        frozen(model={"region": "none"}, train={"feature_bank": str(tmp_path / "run/features")}),
        rocks,
        tmp_path / "again",
        ALONE,
    )
    assert sum(decoded[before:]) == first + 15  # of testing alone
    assert losses(tmp_path / "run") == losses(tmp_path / "again")


@pytest.mark.parametrize("late", [4, 8], ids=["while frozen", "at the thaw"])
def test_a_run_goes_on_with_its_features(rocks, tmp_path, late):
    chosen = frozen(epochs=3, train={"keep_checkpoints": 9})
    whole = trained(chosen, rocks, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in (tmp_path / "cut/checkpoints").glob("step-*"):
        if int(path.stem.removeprefix("step-")) > late:
            path.unlink()
    written = (tmp_path / "cut/features/train/features.f32").stat().st_mtime_ns
    assert trained(chosen, rocks, tmp_path / "cut") == whole
    assert (tmp_path / "cut/features/train/features.f32").stat().st_mtime_ns == written


def test_students_that_share_batches_each_look_up_their_own(rocks, tmp_path):
    """One thaws earlier than the other, one was never frozen: images are decoded from the first that needs them."""
    source = {"teacher": str(make_teacher(tmp_path / "teacher")), "bank": str(tmp_path / "soft")}
    chosen = {
        "long": frozen("distill", distill=source),
        "short": frozen("distill", epochs=3, distill=source | {"alpha": 0.9}, model={"region": "none"}),
    }
    train_together({tmp_path / name: one for name, one in chosen.items()}, rocks, ALONE)
    for name, one in chosen.items():
        alone = trained(one.changed(**{"train.feature_bank": False}), rocks, tmp_path / f"{name} alone")
        assert losses(tmp_path / name) == alone[0] and (tmp_path / name / "features").is_dir()
        assert (tmp_path / name / "model.safetensors").read_bytes() == alone[2]
    free = frozen("distill", epochs=0, distill=source)
    train_together({tmp_path / "free": free, tmp_path / "beside": chosen["long"]}, rocks, ALONE)
    assert losses(tmp_path / "beside") == losses(tmp_path / "long")


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (frozen(epochs=0), "the backbone learns from the first step on"),
        (frozen(data={"views": None}), r"each view of an image is a new one \(data.views is null\)"),
        (
            frozen("classify", data={"augment": {"mixup": 0.2}}),
            "data.augment lets an image look otherwise at each visit, whatever its view",
        ),
        (
            frozen(data={"augment": {"region": "drop"}}),
            "data.augment lets an image look otherwise at each visit, whatever its view",
        ),
    ],
)
def test_a_bank_that_cannot_be_used_is_refused_where_it_is_asked_for(chosen, reason, rocks, tmp_path):
    named = chosen.changed(**{"train.feature_bank": str(tmp_path / "bank")})
    with pytest.raises(UserError, match=rf"^train.feature_bank {tmp_path}/bank: {reason}; drop it"):
        train(named, rocks, tmp_path / "run", ALONE)
    assert not (tmp_path / "bank").exists()


def test_views_that_are_not_shown_twice_are_not_stored(rocks, tmp_path):
    train(frozen(epochs=1, of=1, data={"views": 16}), rocks, tmp_path / "run", ALONE)
    assert not (tmp_path / "run/features").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.region": "largest"}, "region 'threshold, theta 0' instead of 'largest, theta 0'"),
        ({"model.theta": 0.5}, "region 'threshold, theta 0' instead of 'threshold, theta 0.5'"),
        ({"model.area_scale": False}, "region .* instead of 'threshold, theta 0, not times alpha'"),
        ({"model.backbone": "test_resnet.r160_in1k"}, "backbone test_resnet instead of test_resnet.r160"),
        ({"data.crop": 24}, "crop 32 instead of 24"),
        ({"data.views": 3}, "views 2 instead of 3"),
        ({"train.precision": "bf16"}, "precision fp32 instead of bf16"),
        ({"seed": 1, "data.split_seed": 0}, "weights [0-9a-f]{16} instead of [0-9a-f]{16}, seed 0 instead of 1"),
    ],
    ids=str,
)
def test_the_features_of_something_else_are_refused(change, words, rocks, bank, tmp_path):
    with pytest.raises(
        UserError, match=rf"bank {bank}/train: holds the features of something else \({words}\); remove"
    ):
        train(shared(bank).changed(**change), rocks, tmp_path / "run", ALONE)


def shared(bank: Path) -> Recipe:
    return frozen(of=2, epochs=2, train={"feature_bank": str(bank)})


@pytest.fixture(scope="module")
def bank(rocks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    train(shared(folder / "features"), rocks, folder / "run", ALONE)
    return folder / "features"


def test_what_the_head_does_does_not_change_the_features(bank, rocks, tmp_path):
    before = (bank / "train/features.f32").stat().st_mtime_ns
    other = {"contrast.pairs": "hardest", "model.hidden": 16, "optim.lr": 0.01, "model.dropout": 0.3}
    train(shared(bank).changed(**other), rocks, tmp_path / "run", ALONE)
    assert (bank / "train/features.f32").stat().st_mtime_ns == before


def test_the_whole_image_does_not_depend_on_the_seed(rocks, tmp_path):
    """Weights from a file and a split of its own, as in a study over seeds: one bank serves them all."""
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save(build_backbone("test_resnet").net.state_dict(), weights)
    chosen = frozen(
        of=2,
        epochs=2,
        model={"pretrained": str(weights)},
        data={"resize": 32, "flip": False, "views": None, "split_seed": 0},
        train={"feature_bank": str(tmp_path / "features")},
    )
    train(chosen, rocks, tmp_path / "0", ALONE)
    written = (tmp_path / "features/train/features.f32").stat().st_mtime_ns
    train(chosen.changed(seed=1), rocks, tmp_path / "1", ALONE)
    assert (tmp_path / "features/train/features.f32").stat().st_mtime_ns == written
    assert losses(tmp_path / "0") != losses(tmp_path / "1")
