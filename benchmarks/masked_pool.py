"""Times masked pooling, forward and backward, beside the form that its equations suggest, in one run.

    python -m benchmarks masked_pool [--batches 42 16] [--channels 2048] [--json FILE]
    python -m benchmarks masked_pool --model    # what an early or late mask costs by a simulation: _pool_queue.py

Every side is first checked against the reference in float64, on features that are small multiples of 1/8, whose sums
are exact, so that all must find the same region. Rows: the equations as one would write them in PyTorch, the same under
torch.compile, the PyTorch backend and, on a GPU, the Triton kernels; with ``region="largest"`` also the released code's
way, image by image with the region found on the CPU (here by the reference's labelling in Python). The floor is one
read of the features forward and one write of their gradient backward, at the measured bandwidth of a copy; percentages
are the floor's share of the time. Without a GPU a prediction follows: see _predicted.py.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fpcn_kernels import masked_pool, reference
from fpcn_kernels.pooling import plan
from torch import Tensor

from benchmarks._harness import (
    GRAPH,
    MODES,
    Spread,
    arguments,
    compiled,
    copy_bandwidth,
    machine,
    positive,
    show,
    timings,
    write_json,
)

THETA = 0.1
PARTS = ("forward", "backward", "both")
Pool = Callable[[Tensor], Tensor]


def written_out(features: Tensor) -> Tensor:
    """Equations 1 to 5 and 7."""
    activation_BHW = features.detach().sum(1, dtype=torch.float32)
    inside_BHW = activation_BHW >= activation_BHW.mean((1, 2), keepdim=True)
    mask_BHW = torch.where(inside_BHW, 1.0, THETA)
    masked_BCHW = mask_BHW.mean((1, 2))[:, None, None, None] * mask_BHW[:, None] * features
    return masked_BCHW.mean((2, 3))


def image_by_image(features: Tensor) -> Tensor:
    """As the released code goes about the largest region: a loop in which each map goes to the CPU and back."""
    masks = []
    for activation_HW in features.detach().sum(1, dtype=torch.float32):
        inside_HW = (activation_HW >= activation_HW.mean()).cpu()
        masks.append(torch.where(reference._largest_region(inside_HW), 1.0, THETA).to(features.device))
    mask_BHW = torch.stack(masks)
    masked_BCHW = mask_BHW.mean((1, 2))[:, None, None, None] * mask_BHW[:, None] * features
    return masked_BCHW.mean((2, 3))


def ours(features: Tensor, region: str, backend: str) -> Tensor:
    return masked_pool(features, theta=THETA, region=region, backend=backend).pooled


def make_features(batch: int, channels: int, size: int, device: torch.device) -> Tensor:
    """Rectified multiples of 1/8, as the GPU's training has them (bfloat16, channels_last) or the CPU's."""
    torch.manual_seed(0)
    features = (8 * torch.randn(batch, channels, size, size)).round().clamp(min=0) / 8
    if device.type == "cuda":
        features = features.to(device, torch.bfloat16, memory_format=torch.channels_last)
    return features.requires_grad_()


def sides(region: str, features: Tensor) -> dict[str, Pool | str]:
    """What is timed, or why it cannot be."""
    result: dict[str, Pool | str] = {}
    if region == "threshold":
        result["written out"] = written_out
        result["written out, torch.compile"] = compiled(written_out, features)
    else:
        result["image by image"] = image_by_image
    result["ours, PyTorch"] = functools.partial(ours, region=region, backend="torch")
    can_run = features.is_cuda and importlib.util.find_spec("triton") is not None
    result["ours, Triton"] = functools.partial(ours, region=region, backend="triton") if can_run else "needs a GPU"
    return result


def check(pools: dict[str, Pool], features: Tensor, grad: Tensor, region: str) -> float:
    """Largest difference from the reference in float64 over the sides, relative to the largest entry."""
    images = slice(0, 4)
    exact = features[images].detach().double().contiguous().requires_grad_()
    pooled, _, _ = reference.masked_pool(exact, theta=THETA, region=region)
    expected = pooled.detach(), torch.autograd.grad(pooled, exact, grad[images].double())[0]
    errors = []
    for name, pool in pools.items():
        pooled = pool(features)
        got = pooled.detach()[images], torch.autograd.grad(pooled, features, grad)[0][images]
        for which, g, e, tolerance in zip(
            ("pooled", "gradient"),
            got,
            expected,
            (1e-5, 1e-5 if features.dtype == torch.float32 else 1e-2),
            strict=True,
        ):
            error = float((g - e).abs().max() / e.abs().max())
            if not error <= tolerance:
                raise SystemExit(f"{name}: {which} of region {region} is off by {error:.1e} from the reference")
            errors.append(error)
    return max(errors)


def parts(pool: Pool, features: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    pooled = pool(features)
    return {
        "forward": lambda: pool(features),
        "backward": lambda: torch.autograd.grad(pooled, features, grad, retain_graph=True),
        "both": lambda: torch.autograd.grad(pool(features), features, grad),
    }


def measure(features: Tensor, region: str, repeats: int) -> Iterator[tuple[str, dict[str, Spread] | str]]:
    """(side and mode, its times or why there are none), after the check."""
    everything = sides(region, features)
    pools = {name: pool for name, pool in everything.items() if not isinstance(pool, str)}
    grad = torch.randn(features.shape[:2], device=features.device)
    error = check(pools, features, grad, region)
    print(f"B {len(features)}, region {region}: all sides within {error:.1e} of the reference in float64")
    functions = {(name, part): run for name, pool in pools.items() for part, run in parts(pool, features, grad).items()}
    for mode in MODES[features.device.type]:
        # A backward pass runs on the stream of its forward pass, which is not the captured one.
        chosen = {
            k: f for k, f in functions.items() if mode != GRAPH or (k[0] != "image by image" and k[1] != "backward")
        }
        spreads = timings(chosen, repeats, mode)
        for name, pool in everything.items():
            found = {part: spreads[name, part] for part in PARTS if (name, part) in spreads}
            if isinstance(pool, str) and mode == "eager":
                yield name, pool
            elif found:
                yield name if mode == "eager" else f"{name}; {mode}", found


def predict(batches: list[int], channels: int, size: int) -> list[dict[str, Any]]:
    from benchmarks._predicted import masked_pool_work, show_prediction

    sections = {}
    for batch in batches:
        forward, backward = masked_pool_work(batch, channels, size, THETA)
        sections |= {f"B {batch} forward": forward, f"B {batch} backward": backward}
    return show_prediction(
        sections,
        f"C {channels}, {size} x {size}, bfloat16, channels_last. A program of _mask_kernel sums (as many instructions "
        "as pooling) and pools once, one of an image's finds the mask; what is read again comes from the L2.",
    )


def model(batch: int, channels: int, size: int) -> list[dict[str, float]]:
    from benchmarks._pool_queue import Work, show_model
    from benchmarks._predicted import masked_pool_launches

    features, (find, pool, _) = masked_pool_launches(batch, channels, size, THETA)
    view = plan.view(features)
    config = {name: find.arguments[name] for name in ("BP", "BC", "num_warps")}
    lag = plan.lag(view, config, features.device)
    if lag is None:
        raise SystemExit(f"maps of {size} x {size} pixels are read twice: there is nothing to model")
    splits = view.splits(config)
    work = Work(
        images=batch,
        splits=splits,
        tile_bytes=view.image_bytes / splits,
        sum_instructions=pool.per_program(),
        pool_instructions=pool.per_program(),
        mask_seconds=0,
        resident=plan.RESIDENT_WARPS // config["num_warps"],
        lag=lag,
    )
    return show_model(work)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time masked_pool beside its written-out form.")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--batches", type=positive, nargs="+", default=[256, 42] if on_gpu else [42, 16])
    parser.add_argument("--channels", type=positive, default=2048)
    parser.add_argument("--size", type=positive, default=14, help="height and width of the map")
    parser.add_argument("--model", action="store_true", help="simulate 256 images on an H200 instead of measuring")
    options = arguments(parser, "masked_pool", repeats=50 if on_gpu else 9)
    if options.model:
        write_json(options.json, {"modelled_h200": model(256, options.channels, options.size)})
        return
    device = options.device
    bandwidth = copy_bandwidth(device)
    rows, figures = [], []
    for batch in options.batches:
        features = make_features(batch, options.channels, options.size, device)
        floor = {part: features.nbytes * (2 if part == "both" else 1) / bandwidth * 1e3 for part in PARTS}
        for region in ("threshold", "largest"):
            for name, spreads in measure(features, region, options.repeats):
                row = [str(batch), region, name]
                if isinstance(spreads, str):
                    rows.append([*row, spreads, "-", "-"])
                    continue
                cells = [
                    f"{spreads[part]}  {floor[part] / spreads[part].median_ms:4.0%}" if part in spreads else "-"
                    for part in PARTS
                ]
                rows.append([*row, *cells])
                times = {part: spread._asdict() for part, spread in spreads.items()}
                figures.append({"images": batch, "region": region, "side": name, **times})
        rows.append([str(batch), "", "floor", *(f"{floor[part]:.3g}" for part in PARTS)])
        figures.append({"images": batch, "side": "floor", **{f"{part}_ms": floor[part] for part in PARTS}})
    dtype, order = str(features.dtype).removeprefix("torch."), "channels_last" if on_gpu else "contiguous"
    shape = f"C {options.channels}, {options.size} x {options.size}, {dtype}, {order}"
    columns = ["images", "region", "side", *(f"{part}\nms (min - max), %" for part in PARTS)]
    show(
        f"Masked pooling, {shape}; {options.repeats} repeats, interleaved\n{machine(device)}",
        columns,
        rows,
        left=3,
        caption=f"floor: features read once forward, gradient written once backward, at {bandwidth / 1e9:.1f} GB/s, "
        "measured (a copy, read + write); %: its share of the time",
    )
    report: dict[str, object] = {"machine": machine(device), "shape": shape}
    report |= {"copy_bandwidth": bandwidth, "rows": figures}
    if not on_gpu:
        report["predicted_h200"] = predict([256, 42], options.channels, options.size)
    write_json(options.json, report)
