"""The cost of a network, against what its authors published and a clock that is known."""

from __future__ import annotations

import time

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fpcn_dist.models import Classifier
from fpcn_dist.models.cost import measure

CPU = torch.device("cpu")


def test_parameters_and_multiply_adds_are_those_that_torchvision_publishes() -> None:
    published = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta
    cost = measure(Classifier("resnet18", 1000), 224, CPU)
    assert cost.parameters == published["num_params"] == 11_689_512
    assert cost.flops / 2e9 == pytest.approx(published["_ops"], abs=1e-3)
    assert 0.5 < cost.milliseconds < 5000


class Sleeper(nn.Module):
    """Takes 40 ms at first, then 2 ms, and every fourth time 20 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.calls: list[tuple[torch.Size, bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((images.shape, self.training, torch.is_inference_mode_enabled()))
        count = len(self.calls)
        time.sleep(0.04 if count <= 4 else 0.02 if count % 4 == 0 else 0.002)
        return self.layer(images)


def test_the_time_is_a_warm_median_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpcn_dist.models.cost._BUDGET", 0.1)
    model = Sleeper()
    cost = measure(model, 8, CPU)  # pyright: ignore[reportArgumentType]
    assert cost.parameters == 16 and cost.flops == 2 * 3 * 4 * 64
    assert 2 <= cost.milliseconds < 6  # the mean is above 6, and a cold start longer still
    assert len(model.calls) >= 20
    assert set(model.calls) == {(torch.Size([1, 3, 8, 8]), False, True)}
    assert model.training


@pytest.mark.parametrize(("budget", "timed"), [(0.0, 20), (60.0, 100)])
def test_the_clock_runs_as_often_as_it_should(budget: float, timed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpcn_dist.models.cost._BUDGET", budget)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    model = Sleeper()
    measure(model, 8, CPU)  # pyright: ignore[reportArgumentType]
    assert len(model.calls) == 1 + 5 + timed  # one more counts the FLOPs


@pytest.mark.gpu
def test_on_a_gpu_the_work_is_waited_for() -> None:
    device = torch.device("cuda")
    model = Classifier("resnet18", 10)
    small, large = measure(model, 64, device), measure(model, 2048, device)
    assert next(model.parameters()).device.type == "cuda"
    assert large.flops > 900 * small.flops and large.milliseconds > 1.2 * small.milliseconds
