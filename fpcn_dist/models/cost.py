"""What a network costs: parameters, FLOPs, the time that one image takes, and what a device could do.

The model FLOPs utilisation (MFU) of a run is

    MFU = 3 * forward FLOPs of an image * images per second and device / peak_flops

where 3 stands for one forward pass and a backward pass of twice its cost. Some networks compute more for an image in
training than afterwards; what counts is what the training computes.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fpcn_dist.models import Classifier
from fpcn_dist.models.modes import evaluating

_WARM_UP, _FEWEST, _MOST = 5, 20, 100
"""Forward passes before the clock starts, and how many are timed."""
_BUDGET = 2.0
"""Seconds after which no more than ``_FEWEST`` forward passes are timed."""

# Dense datasheet peaks in TFLOP/s as (bfloat16, float32), with float32 accumulation. Where there are TF32 tensor cores,
# float32 is their peak: cuDNN's convolutions use them by default. None: the GPU cannot. The first match counts.
_PEAK_TFLOPS: tuple[tuple[str, float | None, float], ...] = (
    (r"\bB200", 2250.0, 1100.0),
    (r"H200 NVL", 835.5, 417.5),
    (r"H200", 989.5, 494.7),
    (r"H100 PCIe", 756.5, 378.0),
    (r"H100 NVL", 835.5, 417.5),
    (r"H100", 989.5, 494.7),
    (r"A100", 312.0, 156.0),
    (r"L40S", 362.0, 183.0),
    (r"RTX A6000", 154.8, 77.4),
    (r"RTX A5000", 111.1, 55.6),
    (r"RTX 4090", 165.2, 82.6),
    (r"RTX 3090", 71.0, 35.6),
    (r"V100-SXM2", None, 15.7),
    (r"V100", None, 14.0),
)


def datasheet_flops(gpu_name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of the GPU that calls itself ``gpu_name``, at ``precision`` "fp32" or "bf16".

    ``None`` for an unknown GPU, a slice of one (MIG), a laptop's or cut-down variant, or a precision it lacks.
    """
    if re.search(r"MIG|Laptop|Max-Q|\b4090 D\b|3090 Ti", gpu_name):
        return None
    for pattern, bf16, fp32 in _PEAK_TFLOPS:
        if re.search(rf"{pattern}\b", gpu_name):
            peak = bf16 if precision == "bf16" else fp32
            return None if peak is None else peak * 1e12
    return None


def peak_flops(device: torch.device, precision: str) -> float | None:
    """:func:`datasheet_flops` of ``device``; ``None`` for a CPU, whose MFU nobody could compare."""
    if device.type != "cuda":
        return None
    return datasheet_flops(torch.cuda.get_device_name(device), precision)


def model_flops(model: nn.Module, image_size: int) -> int:
    """FLOPs (two per multiply-add) of one forward pass of one [3, ``image_size``, ``image_size``] image.

    Counts matrix products and convolutions. Pass the bare model, not its compiled or distributed wrapper.
    """
    parameter = next(model.parameters())
    image_BCHW = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    with evaluating(model), torch.inference_mode():
        return count_flops(lambda: model(image_BCHW))


def count_flops(compute: Callable[[], object]) -> int:
    """FLOPs (two per multiply-add) of the matrix products and convolutions in ``compute``, which is called once."""
    from torch.utils.flop_counter import FlopCounterMode  # here alone, as it brings Triton

    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


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
