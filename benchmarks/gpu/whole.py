"""Plans what is larger than an operation: training steps, a training on each backend, and decoding on the GPU."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import Spread
from benchmarks.gpu import convergence
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.kernels import PRECISIONS
from benchmarks.gpu.log import Measurement


def plan_steps(bench: Bench) -> Iterator[Measurement]:
    """FPCN's step beside the classifier's; what does not fit into memory says so."""
    for images in (3,) if bench.rehearsal else (42, 128, 256):
        for precision in PRECISIONS:
            settings = {"images": images, "precision": precision}
            run = functools.partial(measure_step, bench, **settings)
            yield Measurement("step", "step", settings, 60, run)


def plan_trainings(bench: Bench) -> Iterator[Measurement]:
    """The convergence run, then the loader."""
    settings = {"seeds": 2, "steps": 2} if bench.rehearsal else {"seeds": 5, "steps": convergence.STEPS}
    yield Measurement("train", "convergence", settings, 90, functools.partial(measure_convergence, bench, **settings))
    for where in ("cpu",) if bench.rehearsal else ("cuda", "cpu"):
        run = functools.partial(measure_loader, bench, where)
        yield Measurement("train", "DALI's decoding", {"on": where}, 45, run)


def measure_step(bench: Bench, images: int, precision: str) -> dict[str, Any]:
    """Milliseconds of both steps, and their ratio."""
    from benchmarks import step

    setting = step.Setting(*(("resnet18", 32) if bench.rehearsal else ("resnet101", 448)), bench.device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        error = step.check(setting)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = step.compare(setting, images, 2 if bench.rehearsal else 30)
    finally:
        torch.set_float32_matmul_precision(before)
    plain, ours = (times[step.NAMES[task]] for task in ("classify", "contrast"))
    ratio = step.ratio_of(ours, plain)
    figures = {"classify": Spread.of(plain)._asdict(), "contrast": Spread.of(ours)._asdict(), "error": error}
    if bench.device.type == "cuda":
        figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return {**figures, "ratio": ratio.median_ms, "ratio_min": ratio.min_ms, "ratio_max": ratio.max_ms}


def measure_convergence(bench: Bench, seeds: int, steps: int) -> dict[str, Any]:
    """Loss curves of each way by windows, and how far they are from PyTorch's in spreads between seeds."""
    everything = convergence.photographs(12 if bench.rehearsal else 96, 32 if bench.rehearsal else 64, bench.device)
    curves = convergence.all_curves(everything, seeds, batch=4 if bench.rehearsal else 32, steps=steps)
    expected = curves[convergence.PYTORCH.name]
    distances = {name: convergence.distance_in_spreads(losses, expected) for name, losses in curves.items()}
    figures: dict[str, Any] = {
        "curves": {name: convergence.windows(losses).mean(0).tolist() for name, losses in curves.items()},
        "distances_in_spreads": distances,
    }
    far = [name for name, distance in distances.items() if not distance <= 1]
    if far and not bench.rehearsal:
        figures["failed"] = f"further from PyTorch's curve than other seeds are: {', '.join(far)}"
    return figures


def measure_loader(bench: Bench, where: str) -> dict[str, Any]:
    """Images a second that DALI decodes, resizes and crops, from a folder of drawn photographs."""
    from fpcn_dist.data.decoding.backends import has_dali

    if not has_dali():
        return {"skipped": "DALI is not installed"}
    from fpcn_dist.data.index.build import build_manifest
    from fpcn_dist.data.loader import TrainLoader
    from fpcn_dist.data.synthetic import generate
    from fpcn_dist.recipe.schema import DataConfig

    sides = {"min_side": 64, "max_side": 96} if bench.rehearsal else {"min_side": 480, "max_side": 640}
    crop, count, batches = (32, 4, 2) if bench.rehearsal else (448, 40, 10)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), images_per_class=2 * count, **sides)
        config = DataConfig(resize=crop + 16, crop=crop, classes_per_batch=None, images_per_class=count)
        loader = TrainLoader(
            build_manifest(Path(folder), config, 0), config, 0, rank=0, world_size=1, device=torch.device(where)
        )
        try:
            next(loader)
            rates = []
            for _ in range(3):
                start = time.perf_counter()
                seen = sum(len(next(loader).images) for _ in range(batches))
                if where == "cuda":
                    torch.cuda.synchronize()
                rates.append(seen / (time.perf_counter() - start))
        finally:
            loader.close()
    return {"images_per_second": statistics.median(rates), "least": min(rates), "most": max(rates)}
