"""What the meter makes of the steps between two log points."""

from __future__ import annotations

import pytest
import torch

from fpcn_dist.data.batch import Batch
from fpcn_dist.runtime.errors import NotFinite
from fpcn_dist.runtime.ranks import CPU, Ranks
from fpcn_dist.tasks import TaskOutput
from fpcn_dist.training.meter import StepMeter

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
