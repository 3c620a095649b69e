"""What the meter makes of the steps between two log points."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fpcn_dist.data.batch import Batch
from fpcn_dist.models.cost import model_flops
from fpcn_dist.runtime.errors import NotFinite
from fpcn_dist.runtime.ranks import CPU, Ranks
from fpcn_dist.tasks import TaskOutput, build_task
from fpcn_dist.training import run as training_run
from fpcn_dist.training.meter import StepMeter, forward_flops
from fpcn_dist.training.run import TrainingRun
from tests.helpers.compared import CLASSES, recipe

ALONE = Ranks(0, 1, 0, 1, CPU)
BATCH = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), torch.arange(2), torch.zeros(2), torch.zeros(2, 3))


def output(loss: float, **parts: float) -> TaskOutput:
    return TaskOutput(torch.tensor(loss), torch.eye(2), {name: torch.tensor(value) for name, value in parts.items()})


def test_a_row_has_just_the_parts_of_its_step():
    """MMAL-Net learns from whole images at first, then from objects and parts as well."""
    meter = StepMeter(ALONE, 2, None)
    meter.add(1, BATCH, output(1.0, image_loss=1.0), None, 0.1, 0.0)
    meter.add(2, BATCH, output(3.0, image_loss=1.0, object_loss=2.0), torch.tensor(4.0), 0.2, 0.0)
    rows, speed = meter.fetch()
    assert rows == [
        {"loss": 1.0, "image_loss": 1.0, "accuracy": 1.0, "lr": 0.1},
        {"loss": 3.0, "image_loss": 1.0, "object_loss": 2.0, "accuracy": 1.0, "grad_norm": 4.0, "lr": 0.2},
    ]
    assert speed["images_per_second"] > 0


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    meter = StepMeter(ALONE, 2, None)
    meter.add(4, BATCH, output(1.0), None, 0.1, 0.0)
    meter.add(5, BATCH, output(float("nan"), part_loss=2.0), None, 0.1, 0.0)
    with pytest.raises(NotFinite, match=r"at step 5: is not finite \(loss nan, part_loss 2\)"):
        meter.fetch()


def in_training(system: str):
    """A compared system in training, and the FLOPs of a forward pass of its network on 112 px."""
    task = build_task(recipe(system), CLASSES, steps_per_epoch=1)
    return task, model_flops(task.model, 112)


@pytest.mark.parametrize("system", ["resnet50", "bilinear_cnn", "api_net"])
def test_most_networks_compute_in_training_what_they_compute_afterwards(system):
    task, forward = in_training(system)
    assert forward_flops(task, 112, step=9) == pytest.approx(forward, rel=0.01)


def test_pca_net_sees_an_image_twice():
    task, forward = in_training("pca_net")
    assert forward_flops(task, 112, step=9) == pytest.approx(2 * forward, rel=0.01)


def test_mmal_net_sees_an_image_then_its_object_and_seven_parts_of_half_the_side():
    task, forward = in_training("mmal_net")  # afterwards: the image and its object
    whole = forward / 2
    assert forward_flops(task, 112, step=0) == pytest.approx(whole, rel=0.01)
    assert forward_flops(task, 112, step=9) == pytest.approx((2 + 7 / 4) * whole, rel=0.1)


def test_nothing_is_counted_for_a_device_of_unknown_peak(monkeypatch):
    monkeypatch.setattr(training_run, "forward_flops", lambda *_: 10)
    trained = SimpleNamespace(ranks=ALONE, recipe=recipe("lenet"), engine=None)
    assert TrainingRun._flops_share(trained) is None  # pyright: ignore[reportArgumentType]
