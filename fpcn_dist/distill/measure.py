"""What a network costs: parameters, FLOPs, and the time that one image takes."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

from fpcn_dist.evaluate import evaluating
from fpcn_dist.flops import model_flops
from fpcn_dist.models import Classifier

_WARM_UP, _FEWEST, _MOST = 5, 20, 100
"""Forward passes before the clock starts, and how many are timed."""
_BUDGET = 2.0
"""Seconds after which no more than ``_FEWEST`` forward passes are timed."""


class Cost(NamedTuple):
    """What one image costs."""

    parameters: int
    flops: int
    """Of one forward pass, two per multiply-add."""
    milliseconds: float
    """Of one forward pass of a batch of one image in float32, the median of many."""


def measure(model: Classifier, image_size: int, device: torch.device) -> Cost:
    """The cost of classifying one [3, ``image_size``, ``image_size``] image.

    Args:
        model: the bare network; it is moved to ``device``, and its modes are left as they were.
        image_size: side of the image in pixels.
        device: where to measure. On a GPU each pass is waited for, as whoever classifies single images must.
    """
    model.to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, model_flops(model, image_size), _median_milliseconds(model, image_size, device))


def _median_milliseconds(model: Classifier, image_size: int, device: torch.device) -> float:
    image_BCHW = torch.rand(1, 3, image_size, image_size, device=device)
    seconds: list[float] = []
    with evaluating(model), torch.inference_mode():
        for _ in range(_WARM_UP):
            model(image_BCHW)
        while len(seconds) < _FEWEST or (len(seconds) < _MOST and sum(seconds) < _BUDGET):
            _wait(device)
            start = time.perf_counter()
            model(image_BCHW)
            _wait(device)
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
