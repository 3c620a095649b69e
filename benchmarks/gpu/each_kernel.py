"""Launches each kernel once between the marks that a profiler waits for: ``ncu --profile-from-start off python -m
benchmarks.gpu.each_kernel K PRECISION``; ``names()`` is what they are called."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from fpcn_kernels._launch import interpreting, recording

from benchmarks import masked_pool as pooling
from benchmarks import pair_contrast as pairs

IMAGES, CHANNELS, SIZE, WIDTH = 256, 2048, 14, 512


def launches(device: torch.device, classes: int, images: int = IMAGES, channels: int = CHANNELS) -> Callable[[], None]:
    """Both passes of both operations."""
    features = pooling.make_features(images, channels, SIZE, device)
    inputs = pairs.make_inputs(images, channels, WIDTH if channels == CHANNELS else 8, classes, device)

    def run() -> None:
        pooled = pooling.ours(features, "threshold", "triton")
        torch.autograd.grad(pooled.sum(), features)
        pairs.step(pairs.pair_contrast, inputs, backend="triton")

    return run


def names(classes: int) -> list[str]:
    """The kernels that are launched; nothing is."""
    run = launches(torch.device("cpu" if interpreting() else "cuda"), classes, 2, 8)
    with recording() as records:
        run()
    return sorted({record[0].__name__ for record in records})


def main() -> None:
    classes, precision = int(sys.argv[1]), sys.argv[2]
    torch.set_float32_matmul_precision(precision)
    run = launches(torch.device("cuda"), classes)
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
