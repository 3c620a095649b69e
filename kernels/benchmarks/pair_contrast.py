"""Times the all-pairs contrast, forward and backward, beside the form that its equations suggest, in one run.

    python kernels/benchmarks/pair_contrast.py [--images 84] [--classes 3] [--json FILE]

Both sides are checked against each other at the timed shape, and ours against the literal reference in float64, before
anything is timed. Peak memory above the inputs is measured in a process each. Uses a CUDA device if there is one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fpcn_kernels import pair_contrast
from rich.console import Console
from rich.table import Table
from torch import Tensor

MIB = 2**20


def written_out(
    pooled: Tensor,
    labels: Tensor,
    fuse_in_weight: Tensor,
    fuse_in_bias: Tensor,
    fuse_out_weight: Tensor,
    fuse_out_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
) -> Tensor:
    """The equations as one would write them in PyTorch: a row for each of the N^2 pairs."""
    images = len(pooled)
    a, b = pooled.repeat_interleave(images, 0), pooled.repeat(images, 1)
    hidden = F.relu(F.linear(torch.cat([a, b], 1), fuse_in_weight, fuse_in_bias))
    fused = F.linear(hidden, fuse_out_weight, fuse_out_bias)
    logits_a = F.linear(a * fused, classifier_weight, classifier_bias)
    logits_b = F.linear(b * fused, classifier_weight, classifier_bias)
    loss_a = F.cross_entropy(logits_a, labels.repeat_interleave(images))
    return (loss_a + F.cross_entropy(logits_b, labels.repeat(images))) / 2


SIDES: dict[str, Callable[..., Tensor]] = {"written out": written_out, "pair_contrast": pair_contrast}


def make_inputs(images: int, channels: int, width: int, classes: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        values = torch.randn(*shape, generator=generator) * fan_in**-0.5
        return values.to(device, dtype).requires_grad_()

    labels = torch.randint(classes, (images,), generator=generator).to(device)
    fuse_in = draw(width, 2 * channels, fan_in=2 * channels), draw(width)
    fuse_out = draw(channels, width, fan_in=width), draw(channels)
    return [
        draw(images, channels),
        labels,
        *fuse_in,
        *fuse_out,
        draw(classes, channels, fan_in=channels),
        draw(classes),
    ]


def step(function: Callable[..., Tensor], inputs: list[Tensor], **options: str) -> list[Tensor]:
    loss = function(*inputs, **options)
    gradients = torch.autograd.grad(loss, [t for t in inputs if t.requires_grad])
    if loss.is_cuda:
        torch.cuda.synchronize()
    return [loss.detach(), *gradients]


def largest_difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """Over the loss and all gradients, each relative to its own largest entry."""
    return max(float((g - e).abs().max() / e.abs().max()) for g, e in zip(got, expected, strict=True))


def peak_memory(side: str, shape: tuple[int, int, int, int], device: str, threads: int) -> float:
    """Peak MiB above the inputs of one forward and backward; run in a process of its own."""
    torch.set_num_threads(threads)
    step(SIDES[side], make_inputs(2, 4, 4, 2, device, torch.float32))  # whatever is loaded on first use
    inputs = make_inputs(*shape, device, torch.float32)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(SIDES[side], inputs)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = peak_resident_mib()
    step(SIDES[side], inputs)
    return peak_resident_mib() - before


def peak_resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def timings(sides: dict[str, Callable[..., Tensor]], inputs: list[Tensor], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repeat; the sides take turns, so that they share whatever else the machine does."""
    milliseconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, function in sides.items():
            start = time.perf_counter()
            step(function, inputs)
            milliseconds[side].append((time.perf_counter() - start) * 1e3)
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Time pair_contrast beside its written-out form.")
    parser.add_argument("--images", type=int, default=84)
    parser.add_argument("--large-images", type=int, default=2048, help="batch that only pair_contrast can hold")
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    sizes = arguments.channels, arguments.width, arguments.classes
    # In float64: in float32 one hidden unit near zero falls on either side of the relu, as it happens.
    inputs = make_inputs(7, 33, 19, arguments.classes, device, torch.float64)
    reference_error = largest_difference(step(pair_contrast, inputs), step(pair_contrast, inputs, backend="reference"))
    inputs = make_inputs(arguments.images, *sizes, device, torch.float64)
    error = largest_difference(step(pair_contrast, inputs), step(written_out, inputs))
    if max(reference_error, error) > 1e-10:
        raise SystemExit(f"pair_contrast is off by {reference_error:.1e} from the reference, {error:.1e} written out")

    rows = []
    for images, sides, repeats in [
        (arguments.images, SIDES, arguments.repeats),
        (arguments.large_images, {"pair_contrast": pair_contrast}, max(1, arguments.repeats // 3)),
    ]:
        inputs = make_inputs(images, *sizes, device, torch.float32)
        for side, milliseconds in timings(sides, inputs, repeats).items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory = pool.apply(peak_memory, (side, (images, *sizes), device, arguments.threads))
            rows.append(
                {
                    "side": side,
                    "images": images,
                    "median_ms": statistics.median(milliseconds),
                    "min_ms": min(milliseconds),
                    "max_ms": max(milliseconds),
                    "repeats": repeats,
                    "peak_mib_above_inputs": memory,
                }
            )
    machine = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {arguments.threads} thread(s)"
    )
    title = (
        f"All-pairs contrast, forward + backward, float32: C {sizes[0]}, D {sizes[1]}, K {sizes[2]}; {machine}, "
        f"torch {torch.__version__}\nfloat64 loss and gradients, largest relative difference: {error:.1e} from the "
        f"written-out form, {reference_error:.1e} from the reference (small shape)"
    )
    table = Table("images", "side", "median ms", "min - max", "speed-up", "peak MiB above inputs", title=title)
    for row in rows:
        baseline = rows[0]["median_ms"] if row["images"] == rows[0]["images"] else None
        table.add_row(
            str(row["images"]),
            row["side"],
            f"{row['median_ms']:.1f}",
            f"{row['min_ms']:.1f} - {row['max_ms']:.1f} ({row['repeats']})",
            f"{baseline / row['median_ms']:.1f}x" if baseline else "-",
            f"{row['peak_mib_above_inputs']:.0f}",
        )
    Console(width=None if os.isatty(1) else 120).print(table)
    if arguments.json:
        report = {"machine": machine, "torch": torch.__version__, "channels": sizes[0], "width": sizes[1]}
        report |= {"classes": sizes[2], "written_out_error": error, "reference_error": reference_error, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
