"""Plans the measurements of the operations. Each side is checked against float64 right before it is timed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from fpcn_kernels import pair_contrast

from benchmarks import masked_pool as pooling
from benchmarks import pair_contrast as pairs
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.log import Measurement

PRECISIONS = ("highest", "high")
"""Of float32 products: at the second the kernels may use the matrix units."""
# A loss of so many images is compared with float64; larger batches repeat these.
_CHECKED_IMAGES = 256
# What a side's gradients may be off by, in norm, at each precision.
_TOLERANCES = {"highest": 1e-4, "high": 1e-2}
_OURS = ("ours, Triton", "ours, PyTorch")
# The largest region is found image by image where it is written out, which takes seconds.
_POOLING_SIDES = {"threshold": (*_OURS, "written out", "written out, torch.compile"), "largest": _OURS}


def plan(bench: Bench) -> Iterator[Measurement]:
    """Pooling, then pairs: first those that people train with, the longest last."""
    for batch in (2,) if bench.rehearsal else (256, 42):
        for region in ("threshold", "largest"):
            for side in _POOLING_SIDES[region]:
                settings = {"images": batch, "region": region, "side": side}
                run = functools.partial(measure_pool, bench, **settings)
                yield Measurement("kernels", "masked_pool", settings, 60 if "compile" in side else 15, run)
    for images in (2,) if bench.rehearsal else (336, 4096):
        for classes in (3, 9) if bench.rehearsal else (3, 200):
            for precision in PRECISIONS:
                for side in _pair_sides(images, classes):
                    settings = {"images": images, "classes": classes, "precision": precision, "side": side}
                    yield _pair(bench, settings, 90 if side == pairs.COMPILED else 30)
    for images in (4,) if bench.rehearsal else (16384, 65536):
        for precision in PRECISIONS:
            settings = {"images": images, "classes": 3, "precision": precision, "side": pairs.TRITON}
            yield _pair(bench, settings, 25 if images < 60000 else 60)


def _pair_sides(images: int, classes: int) -> list[str]:
    """Those that can pay: written out, 4,096 images would need a terabyte, and torch.compile takes a minute."""
    sides = [pairs.TRITON, pairs.TORCH]
    if images <= 336:
        sides.append(pairs.WRITTEN_OUT)
        if classes == 3:
            sides.append(pairs.COMPILED)
    return sides


def measure_pool(bench: Bench, images: int, region: str, side: str) -> dict[str, Any]:
    """Milliseconds of the forward pass, and of both passes."""
    channels, size = (16, 4) if bench.rehearsal else (2048, 14)
    features = pooling.make_features(images, channels, size, bench.device)
    pool = _pooling_side(bench, side, region)
    if side == "written out, torch.compile":
        pool = pooling.compiled(pool, features)
    if isinstance(pool, str):
        return {"skipped": pool}
    grad = torch.randn(features.shape[:2], device=bench.device)
    figures: dict[str, Any] = {"error": pooling.check({side: pool}, features, grad, region)}
    inputs = [features.detach().clone().requires_grad_() for _ in range(bench.copies(features.nbytes))]
    parts = {
        "forward": [functools.partial(pool, copy) for copy in inputs],
        "both": [functools.partial(_pool_both, pool, copy, grad) for copy in inputs],
    }
    figures["peak_mib"] = bench.peak_mib(parts["both"][0])
    for part, runs in parts.items():
        floor = features.nbytes * (2 if part == "both" else 1) / bench.copy_bytes * 1e3
        figures[part] = {**bench.timed(runs), "floor_ms": floor}
    return figures


def _pooling_side(bench: Bench, side: str, region: str) -> pooling.Pool:
    if side.startswith("ours"):
        return functools.partial(pooling.ours, region=region, backend="triton" if "Triton" in side else "torch")
    return pooling.written_out


def _pool_both(pool: pooling.Pool, features: torch.Tensor, grad: torch.Tensor) -> object:
    return torch.autograd.grad(pool(features), features, grad)


def _pair(bench: Bench, settings: dict[str, Any], seconds: float) -> Measurement:
    return Measurement(
        "kernels", "pair_contrast", settings, seconds, functools.partial(measure_pairs, bench, **settings)
    )


def measure_pairs(bench: Bench, images: int, classes: int, precision: str, side: str) -> dict[str, Any]:
    """Milliseconds of the loss with all gradients, how far these are from float64, and memory above the inputs."""
    channels, width = (16, 8) if bench.rehearsal else (2048, 512)
    checked = 2 if bench.rehearsal else _CHECKED_IMAGES
    base = checked if images % checked == 0 else images
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        small = pairs.make_inputs(base, channels, width, classes, bench.device)
        inputs = pairs.repeated(small, images // base)
        function = _pair_side(bench, side, inputs)
        if isinstance(function, str):
            return {"skipped": function}
        errors = _pair_errors(function, inputs, base, classes)
        worst = max(errors.values())
        if not worst <= _TOLERANCES[precision]:
            return {"failed": f"off by {worst:.1e} from float64, in norm", "errors": errors}
        run = functools.partial(pairs.step, function, inputs)
        peak = bench.peak_mib(run)
        copies = bench.copies(sum(tensor.nbytes for tensor in (inputs.pooled, *inputs.head)))
        runs = [functools.partial(pairs.step, function, _copied(inputs)) for _ in range(copies)]
        matrix = bench.float16_flops if precision == "high" else 0.0
        floor = pairs.floor_ms(images, channels, width, classes, bench.float32_flops, matrix)
        return {**bench.timed(runs), "floor_ms": floor, "errors": errors, "peak_mib": peak}
    finally:
        torch.set_float32_matmul_precision(before)


def _pair_side(bench: Bench, side: str, inputs: pairs.Inputs) -> pairs.Loss | str:
    if bench.rehearsal and side == pairs.TRITON:
        return functools.partial(pair_contrast, backend="triton")
    return pairs.side(side, inputs)


def _pair_errors(function: pairs.Loss, inputs: pairs.Inputs, base: int, classes: int) -> dict[str, float]:
    channels, width = inputs.head.fuse_out_weight.shape
    exact = pairs.make_inputs(base, channels, width, classes, inputs.pooled.device, torch.float64)
    expected = pairs.step(functools.partial(pair_contrast, backend="torch"), exact)
    times = len(inputs.pooled) // base
    expected[1] = expected[1].repeat(times, 1) / times
    return pairs.errors(pairs.step(function, inputs), expected)


def _copied(inputs: pairs.Inputs) -> pairs.Inputs:
    pooled, *head = (tensor.detach().clone().requires_grad_() for tensor in (inputs.pooled, *inputs.head))
    return pairs.Inputs(pooled, inputs.labels, pairs.PairHead(*head))
