"""Times the all-pairs contrast, forward and backward, beside the form that its equations suggest, in one run.

    python -m benchmarks pair_contrast [--images 84 336 2048] [--classes 3] [--huge] [--json FILE]

The loss and all gradients are first checked against the reference in float64 at a small shape, and every side against
the written-out form at the smallest timed batch (the PyTorch backend in float64, the others in float32). Rows: the
equations as one would write them in PyTorch, the same under torch.compile (both left out where they would not fit into
memory), the PyTorch backend and, on a GPU, the Triton kernels. The floor is the multiply-adds of the re-associated form
(docs/kernels.md), those that remain once every product is shared, at the measured float32 rate of a large product (in
TF32 with --high): with L = K - 1 classes 12 L D for a pair,
12 C D + 6 L C D for an image;
relu, softmax and memory are not in it. Peak memory above the inputs is measured in a process each. Without a GPU a
prediction follows: see _predicted.py.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fpcn_kernels import PairHead, pair_contrast
from torch import Tensor

from benchmarks._harness import MODES, arguments, compiled, machine, matmul_rate, positive, show, timings, write_json

MIB = 2**20
Loss = Callable[..., Tensor]
WRITTEN_OUT, COMPILED, TORCH, TRITON = "written out", "written out, torch.compile", "ours, PyTorch", "ours, Triton"


class Inputs(NamedTuple):
    """The arguments of the loss."""

    pooled: Tensor
    labels: Tensor
    head: PairHead


def written_out(pooled: Tensor, labels: Tensor, head: PairHead) -> Tensor:
    """The equations as one would write them in PyTorch: a row for each of the N^2 pairs."""
    images = len(pooled)
    a, b = pooled.repeat_interleave(images, 0), pooled.repeat(images, 1)
    hidden = F.relu(F.linear(torch.cat([a, b], 1), head.fuse_in_weight, head.fuse_in_bias))
    fused = F.linear(hidden, head.fuse_out_weight, head.fuse_out_bias)
    logits_a = F.linear(a * fused, head.classifier_weight, head.classifier_bias)
    logits_b = F.linear(b * fused, head.classifier_weight, head.classifier_bias)
    loss_a = F.cross_entropy(logits_a, labels.repeat_interleave(images))
    return (loss_a + F.cross_entropy(logits_b, labels.repeat(images))) / 2


def make_inputs(
    images: int, channels: int, width: int, classes: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Multiples of 1/256, so that u and v are exact in float32 and TF32, and no unit near zero falls on either side of
    the relu, as it happens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        values = torch.randn(*shape, generator=generator) * fan_in**-0.5
        return ((values * 256).round() / 256).to(device, dtype).requires_grad_()

    labels = torch.randint(classes, (images,), generator=generator).to(device)
    fuse_in = draw(width, 2 * channels, fan_in=2 * channels), draw(width)
    fuse_out = draw(channels, width, fan_in=width), draw(channels)
    pooled = draw(images, channels)
    classifier = draw(classes, channels, fan_in=channels), draw(classes)
    return Inputs(pooled, labels, PairHead(*fuse_in, *fuse_out, *classifier))


def step(function: Loss, inputs: Inputs, **options: str) -> list[Tensor]:
    """The loss and all gradients."""
    loss = function(*inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [inputs.pooled, *inputs.head])]


def repeated(inputs: Inputs, times: int) -> Inputs:
    """A batch that holds every image so many times: its loss is that of ``inputs``, and so are the gradients of the
    head; those of the images are divided by ``times``."""
    pooled = inputs.pooled.detach().repeat(times, 1).requires_grad_()
    return Inputs(pooled, inputs.labels.repeat(times), inputs.head)


def errors(got: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Of the loss and all gradients: the norm of the difference, relative to the expected norm."""
    names = ("loss", "pooled", *PairHead._fields)
    return {name: float((g.double() - e).norm() / e.norm()) for name, g, e in zip(names, got, expected, strict=True)}


def largest_difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference over the loss and all gradients, each relative to its own largest entry."""
    return max(float((g - e).abs().max() / e.abs().max()) for g, e in zip(got, expected, strict=True))


def side(name: str, inputs: Inputs) -> Loss | str:
    """What is timed under that name, or why it cannot be."""
    if name in (WRITTEN_OUT, COMPILED):
        pooled = inputs.pooled
        # At its peak nine tensors [N^2, C], of which the concatenation is two.
        needed, free = 9 * len(pooled) ** 2 * pooled[0].nbytes, free_memory(pooled.device)
        if needed > 0.8 * free:
            return f"needs {needed / 2**30:.0f} of {free / 2**30:.0f} GiB"
        return written_out if name == WRITTEN_OUT else compiled(written_out, *inputs)
    if name == TRITON and not (inputs.pooled.is_cuda and importlib.util.find_spec("triton")):
        return "needs a GPU"
    return partial(pair_contrast, backend="torch" if name == TORCH else "triton")


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024


def check(sizes: tuple[int, int, int], images: int, device: torch.device) -> str:
    """Raises SystemExit if a side is wrong; tells how close they are."""
    inputs = make_inputs(7, 33, 19, sizes[2], device, torch.float64)
    small = largest_difference(step(pair_contrast, inputs), step(pair_contrast, inputs, backend="reference"))
    inputs = make_inputs(images, *sizes, device, torch.float64)
    expected = step(written_out, inputs)
    errors = {"PyTorch, float64": largest_difference(step(pair_contrast, inputs), expected)}
    inputs = make_inputs(images, *sizes, device)
    for name in (WRITTEN_OUT, TORCH, TRITON):
        function = side(name, inputs)
        if not isinstance(function, str):
            errors[f"{name}, float32"] = largest_difference(step(function, inputs), expected)
    # TF32 has 10 bits.
    precise = torch.get_float32_matmul_precision() == "highest"
    tolerances = (1e-10 if "float64" in name else 1e-4 if precise else 1e-2 for name in errors)
    wrong = small > 1e-10 or any(not error <= most for error, most in zip(errors.values(), tolerances, strict=True))
    text = f"{small:.1e} from the reference in float64 (7 images, small layers); from the written-out form in float64 "
    text += f"({images} images): " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if wrong:
        raise SystemExit(f"Loss and gradients are off by {text}")
    return text


def peak_memory(name: str, shape: tuple[int, int, int, int], device: torch.device, threads: int) -> float | None:
    """Peak MiB above the inputs of one forward and backward; run in a process of its own."""
    torch.set_num_threads(threads)
    inputs = make_inputs(*shape, device)
    function = side(name, inputs)
    if isinstance(function, str):
        return None
    # Whatever is loaded on first use; under torch.compile it is its own shape that must be compiled.
    step(function, inputs if name == COMPILED else make_inputs(2, 4, 4, 2, device))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(function, inputs)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up left in the heap would hide what is needed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident_mib("VmRSS")
    step(function, inputs)
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def floor_flops(images: int, channels: int, width: int, classes: int) -> float:
    """Forward and backward: docs/kernels.md."""
    classes -= 1  # the first is at 0
    return 12 * images**2 * classes * width + images * (12 * channels * width + 6 * classes * channels * width)


def floor_ms(images: int, channels: int, width: int, classes: int, fma_flops: float, matrix_flops: float) -> float:
    """Least milliseconds of the kernels' forms on a device that does so many FLOP a second: docs/kernels.md.

    Args:
        fma_flops: of float32 multiply-adds, at which 4 K - 1 instructions for a pair, unit and side are issued; 0 where
            the matrix units compute instead: four products of each hidden vector with the K - 1 classes, padded to 8.
        matrix_flops: of the matrix units; 0 without.
    """
    units = 2 * images**2 * width
    dense = images * (12 * channels * width + 6 * (classes - 1) * channels * width)
    if matrix_flops:
        return (units * 8 * 8 * math.ceil((classes - 1) / 8) + dense) / matrix_flops * 1e3
    return (2 * units * (4 * classes - 1) + dense) / fma_flops * 1e3


def predict(channels: int, width: int) -> list[dict[str, Any]]:
    from benchmarks._predicted import pair_contrast_work, show_prediction

    sections = {}
    for images, classes in [(336, 3), (4096, 3), (336, 200)]:
        for rounded in (False, True):
            name = f"N {images}, K {classes}" + (", float16" if rounded else "")
            sections[name] = pair_contrast_work(images, classes, channels, width, rounded)
    return show_prediction(
        sections,
        f"C {channels}, D {width}, forward + backward. Dense products: 12 N C D + 6 N (K - 1) C D FLOPs, as fused "
        "multiply-adds or, beside float16, in TF32. Scores stay in the L2. PyTorch's elementwise launches between are "
        "not in it.",
    )


def measure(options: argparse.Namespace, images: int, rate: float) -> list[dict[str, Any]]:
    """A row for each side and mode."""
    shape = images, options.channels, options.width, options.classes
    inputs = make_inputs(*shape, options.device)
    functions = {name: side(name, inputs) for name in (WRITTEN_OUT, COMPILED, TORCH, TRITON)}
    runs = {name: partial(step, function, inputs) for name, function in functions.items() if callable(function)}
    repeats = options.repeats if options.device.type == "cuda" or images < 200 else max(1, options.repeats // 3)
    spreads = {mode: timings(runs, repeats, mode) for mode in MODES[options.device.type]}
    floor_ms = floor_flops(*shape) / rate * 1e3
    rows: list[dict[str, Any]] = []
    for name, function in functions.items():
        if isinstance(function, str):
            rows.append({"images": images, "side": name, "missing": function})
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            memory = pool.submit(peak_memory, name, shape, options.device, options.threads).result()
        for mode, spread in ((mode, spreads[mode][name]) for mode in spreads):
            label = name if mode == "eager" else f"{name}; {mode}"
            share = floor_ms / spread.median_ms
            rows.append({"images": images, "side": label, **spread._asdict(), "floor_share": share, "peak_mib": memory})
            rows[-1]["text"] = str(spread)
    return [*rows, {"images": images, "side": "floor", "median_ms": floor_ms, "text": f"{floor_ms:.3g}"}]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time pair_contrast beside its written-out form.")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--images", type=positive, nargs="+", default=[336, 4096, 16384] if on_gpu else [84, 336, 2048])
    parser.add_argument("--huge", action="store_true", help="65536 images too")
    parser.add_argument("--channels", type=positive, default=2048)
    parser.add_argument("--width", type=positive, default=512, help="hidden units")
    parser.add_argument("--classes", type=positive, default=3)
    parser.add_argument("--high", action="store_true", help="let PyTorch multiply in TF32, and the kernels in float16")
    options = arguments(parser, "pair_contrast", repeats=50 if on_gpu else 9)
    sizes = options.channels, options.width, options.classes
    if options.high:
        torch.set_float32_matmul_precision("high")
    agreement = check(sizes, min(84, *options.images), options.device)
    print(f"Loss and gradients, largest relative difference: {agreement}")
    rate = matmul_rate(options.device, tf32=options.high)
    rows = [row for images in [*options.images, *[65536] * options.huge] for row in measure(options, images, rate)]
    written = {row["images"]: row["median_ms"] for row in rows if row["side"] == WRITTEN_OUT and "median_ms" in row}
    cells = []
    for row in rows:
        images = row["images"]
        speed_up = f"{written[images] / row['median_ms']:.1f}x" if images in written and "floor_share" in row else "-"
        share = f"{row['floor_share']:.0%}" if "floor_share" in row else "-"
        memory = f"{row['peak_mib']:.0f}" if row.get("peak_mib") is not None else "-"
        repeats = str(row.get("repeats", "-"))
        cells.append([str(images), row["side"], row.get("text") or row["missing"], repeats, speed_up, share, memory])
    shape = f"C {sizes[0]}, D {sizes[1]}, K {sizes[2]}, float32" + (", high precision" if options.high else "")
    show(
        f"All-pairs contrast, forward + backward: {shape}; repeats interleaved\n{machine(options.device)}",
        ["images", "side", "ms (min - max)", "repeats", "speed-up", "of floor", "peak MiB above inputs"],
        cells,
        left=2,
        caption=f"floor: multiply-adds of the re-associated form at {rate / 1e9:.0f} GFLOP/s, measured",
    )
    report = {
        "machine": machine(options.device),
        "shape": shape,
        "agreement": agreement,
        "flop_rate": rate,
        "rows": rows,
    }
    if not on_gpu:
        report["predicted_h200"] = predict(options.channels, options.width)
    write_json(options.json, report)
