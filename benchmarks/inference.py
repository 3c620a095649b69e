"""Time of a frozen backbone on the CPU: onnxruntime beside eager PyTorch and what makes that faster."""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._harness import Spread, arguments, machine, positive, show, write_json
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.folder.folders import find_images
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.deploy.onnx_backbone import FrozenBackbone
from fpcn_dist.models import Backbone, build_backbone
from fpcn_dist.recipe.schema import DataConfig

WEIGHTS = Path(__file__).parents[2] / "shared" / "weights"
NETWORKS = ("mobilenet_v2", "resnet18")


def _backbone(name: str) -> Backbone:
    """With its weights, where they lie beside the checkout."""
    file = WEIGHTS / f"{name}.safetensors"
    torch.manual_seed(0)
    return build_backbone(name, pretrained=str(file) if file.is_file() else False).eval().requires_grad_(False)


def _sides(backbone: Backbone, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to the features of ``images``, the eager one first."""
    from torch.fx.experimental.optimization import fuse

    last = images.contiguous(memory_format=torch.channels_last)
    channels_last = copy.deepcopy(backbone).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # The networks measured here are sequences of layers, which their forward passes call in turn.
    folded = fuse(copy.deepcopy(backbone.net)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    exported = FrozenBackbone(backbone)
    return {
        "eager": lambda: backbone(images),
        "eager, channels last": lambda: channels_last(last),
        "eager, channels last, BatchNorm folded": lambda: folded(last),
        "torch.jit, frozen": _frozen(backbone, images),
        "torch.jit, frozen, channels last": _frozen(channels_last, last),
        "onnxruntime": lambda: exported(images),
    }


def _frozen(backbone: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(backbone, images)))
    return lambda: frozen(images)


def _cpu_times(sides: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, Spread]:
    """Milliseconds of CPU time of each side, in turn: the clock would count what others use of the machine, too."""
    measured: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in list(sides)[:: -1 if repeat % 2 else 1]:
            began = time.process_time()
            sides[side]()
            measured[side].append(1e3 * (time.process_time() - began))
    return {side: Spread.of(values) for side, values in measured.items()}


def measure(name: str, images: Tensor, repeats: int) -> list[dict[str, object]]:
    """One row for each way, of milliseconds an image."""
    backbone = _backbone(name)
    with torch.inference_mode():
        sides = _sides(backbone, images)
        began = time.process_time()
        sides["onnxruntime"]()  # exports
        export = time.process_time() - began
        expected = sides["eager"]()
        differences = {
            side: ((run() - expected).abs().max() / expected.abs().max()).item() for side, run in sides.items()
        }
        spreads = _cpu_times(sides, repeats)
    eager = spreads["eager"].min_ms
    return [
        {
            "network": name,
            "way": side,
            "ms": spread.min_ms / len(images),
            "median_ms": spread.median_ms / len(images),
            "times": eager / spread.min_ms,
            "difference": differences[side],
            "export_s": export if side == "onnxruntime" else 0.0,
        }
        for side, spread in spreads.items()
    ]


def measure_pass(name: str, data: Path, batch: int, size: int) -> dict[str, float]:
    """CPU seconds of a pass over a folder: decoding alone, with eager PyTorch, with onnxruntime and its export."""
    blobs = Blob.of_files(find_images(data))
    config = DataConfig(resize=size, crop=size, eval_batch_size=batch, threads=torch.get_num_threads())
    ids = np.arange(len(blobs))
    loader = EvalLoader(blobs, 0 * ids, ids, config, rank=0, world_size=1, device=torch.device("cpu"))
    sides: dict[str, Callable[[], Callable[[Tensor], object]]] = {
        "decoding": lambda: len,
        "eager": lambda: FrozenBackbone(_backbone(name)).eager,
        "onnxruntime": lambda: FrozenBackbone(_backbone(name)),
    }
    seconds = {}
    for side, prepare in sides.items():
        began, look = time.process_time(), prepare()
        for shown in loader:
            look(shown.images)
        seconds[side] = time.process_time() - began
    listed = ", ".join(f"{side} {taken:.1f} s" for side, taken in seconds.items())
    gain = seconds["eager"] / seconds["onnxruntime"]
    print(f"{name}, CPU time of a pass over {len(blobs)} images: {listed}: {gain:.1f} times as fast as eager")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks inference", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help=f"default {' '.join(NETWORKS)}")
    parser.add_argument("--batch", type=positive, default=16, help="images of a batch (default 16)")
    parser.add_argument("--size", type=positive, default=224, help="pixels of a side (default 224)")
    parser.add_argument("--data", type=Path, help="image folder for a whole pass with decoding and export")
    args = arguments(parser, "inference", 15)
    images = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(1))
    rows = [row for name in args.networks for row in measure(name, images, args.repeats)]
    shown = [
        [
            str(row["network"]),
            str(row["way"]),
            f"{row['ms']:.1f}",
            f"{row['median_ms']:.1f}",
            f"{row['times']:.2f}",
            f"{row['difference']:.0e}",
            f"{row['export_s']:.1f}" if row["export_s"] else "-",
        ]
        for row in rows
    ]
    columns = ["network", "way", "CPU-ms an image", "median", "times eager", "difference", "export, CPU-s"]
    title = f"Frozen backbones, {args.batch} images of {args.size} px; {machine(torch.device('cpu'))}"
    caption = (
        f"CPU time, least of {args.repeats} repeats in turn; differences from eager as shares of the largest feature."
    )
    show(title, columns, shown, 2, caption)
    report = {"machine": machine(torch.device("cpu")), "batch": args.batch, "size": args.size, "rows": rows}
    if args.data is not None:
        passes = {name: measure_pass(name, args.data, args.batch, args.size) for name in args.networks}
        report["passes_s"] = passes
    write_json(args.json, report)
