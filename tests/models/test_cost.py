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
    assert cost.milliseconds > 0


class Clock:
    """Stands still but where it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Worker(nn.Module):
    """Takes 40 ms at first, then 2 ms, and every fourth time 20 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.layer = nn.Conv2d(3, 4, 1)
        self.calls: list[tuple[torch.Size, bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((images.shape, self.training, torch.is_inference_mode_enabled()))
        count = len(self.calls)
        self.clock.now += 0.04 if count <= 4 else 0.02 if count % 4 == 0 else 0.002
        return self.layer(images)


def test_the_time_is_a_warm_median_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpcn_dist.models.cost._BUDGET", 0.1)
    model = Worker()
    monkeypatch.setattr(time, "perf_counter", model.clock)
    cost = measure(model, 8, CPU)  # pyright: ignore[reportArgumentType]
    assert cost.parameters == 16 and cost.flops == 2 * 3 * 4 * 64
    assert cost.milliseconds == pytest.approx(2)  # the mean is above 6, and a cold start longer still
    assert len(model.calls) >= 20
    assert set(model.calls) == {(torch.Size([1, 3, 8, 8]), False, True)}
    assert model.training


@pytest.mark.parametrize(("budget", "timed"), [(0.0, 20), (60.0, 100)])
def test_the_clock_runs_as_often_as_it_should(budget: float, timed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpcn_dist.models.cost._BUDGET", budget)
    model = Worker()
    monkeypatch.setattr(time, "perf_counter", model.clock)
    measure(model, 8, CPU)  # pyright: ignore[reportArgumentType]
    assert len(model.calls) == 1 + 5 + timed  # one more counts the FLOPs


@pytest.mark.gpu
def test_on_a_gpu_the_work_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    model, waits = Classifier("resnet18", 10), []
    synchronize = torch.cuda.synchronize
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: (waits.append(args), synchronize(*args)))
    measure(model, 64, device)
    assert next(model.parameters()).device.type == "cuda"
    assert len(waits) >= 2 * 20  # before and after each of the passes that are timed
