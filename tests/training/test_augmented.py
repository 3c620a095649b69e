"""Trainings whose views are changed and mixed: they go on exactly, and a bank holds what students see."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.recipe.reading import load_recipe
from fpcn_dist.runtime.errors import Preempted
from fpcn_dist.tasks import build_task
from fpcn_dist.training.loop import train
from fpcn_dist.training.soft_labels import attach
from tests.helpers.distilling import ALONE, CPU, make_teacher, recipe
from tests.helpers.launching import losses
from tests.helpers.preempting import StopAfter

CHANGED = {"random_resized_crop": [0.2, 1.0], "brightness": 0.3, "hue": 0.1, "policy": "rand", "erasing": 0.3}
MIXED = CHANGED | {"mixup": 0.3, "cutmix": 1.0}


@pytest.mark.slow
def test_a_training_goes_on_with_the_same_views_and_mixtures(tmp_path, rocks) -> None:
    chosen = recipe("classify", data={"augment": MIXED, "fit": "short_side", "class_weights": "effective"})
    train(chosen, rocks, tmp_path / "whole", ALONE)
    with pytest.raises(Preempted):
        train(chosen, rocks, tmp_path / "parts", ALONE, preemption=StopAfter(4))  # pyright: ignore[reportArgumentType]
    train(load_recipe(tmp_path / "parts/recipe.yaml"), rocks, tmp_path / "parts", ALONE)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_bank_holds_the_views_that_students_see(tmp_path, rocks) -> None:
    teacher = make_teacher(tmp_path / "teacher", data={"fit": "pad"})
    for mode in ("bank", "online"):
        data, distill = {"augment": CHANGED, "fit": "pad"}, {"teacher": str(teacher), "teacher_mode": mode}
        train(recipe(data=data, distill=distill, train={"epochs": 1}), rocks, tmp_path / mode, ALONE)
    assert losses(tmp_path / "bank") == losses(tmp_path / "online")


def test_a_teacher_in_the_step_sees_the_mixed_images(tmp_path, rocks, monkeypatch) -> None:
    teacher, shown = make_teacher(tmp_path / "teacher"), []
    chosen = recipe(
        data={"augment": {"mixup": 1.0}},
        distill={"teacher": str(teacher), "teacher_mode": "online"},
        train={"epochs": 1},
    )
    opened = attach.open_teacher

    def watched(*args):
        model = opened(*args)
        return lambda images: shown.append(images) or model(images)

    monkeypatch.setattr(attach, "open_teacher", watched)
    train(chosen, rocks, tmp_path / "student", ALONE)
    manifest = build_manifest(rocks, chosen.data, chosen.seed)
    loader = TrainLoader(manifest, chosen.data, chosen.seed, rank=0, world_size=1, device=CPU)
    with contextlib.closing(loader):
        for images in shown:
            batch = next(loader)
            assert batch.targets is not None and torch.equal(images, batch.images)
    assert len(shown) == 3


def test_the_loss_of_mixed_images_counts_the_shares_and_weights_of_classes() -> None:
    chosen = recipe("classify", data={"class_weights": "inverse"})
    task = build_task(chosen, 3, class_counts=(10, 20, 40)).eval()
    labels, places = torch.tensor([0, 1, 2, 1]), torch.arange(4)
    targets = torch.tensor([[0.3, 0.7, 0], [0.7, 0.3, 0], [0, 0.6, 0.4], [0, 0.4, 0.6]])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, labels, places, places, torch.zeros(4, 5), targets=targets)
    output = task(batch, 0)
    log_p = F.log_softmax(output.logits.double(), dim=1)
    weights = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64) * 3 / 7
    expected = -(weights * targets.double() * log_p).sum() / 4
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert "class_weights" not in task.state_dict()
