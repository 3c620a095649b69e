"""Times a whole training step of FPCN beside that of the plain classifier on the same backbone, in one run.

    python -m benchmarks step [--backbone resnet18] [--crop 96] [--batches 42] [--json FILE]

A step is what training does with a batch that is on its device: forward, loss, backward and SGD's update, by the
project's own tasks and optimizer; random images, fresh weights. The steps of both take turns, and each ratio is that of
two neighbours, so that its spread is what the machine adds. Before anything is timed FPCN's loss over pairs is compared
with the references', in float64 from the same features. Defaults are the paper's setting on a GPU
(ResNet-101, 448 px, bfloat16 autocast, channels_last, 42 and 128 images), and on the CPU a ResNet-18 at 96 px in
float32. Without a GPU a prediction follows for the paper's setting: what FPCN adds to the backbone; see _predicted.py.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from fpcn_kernels import PairHead, reference
from torch import Tensor

from benchmarks._harness import Spread, arguments, machine, milliseconds, positive, show, write_json
from fpcn_dist.data.batch import Batch
from fpcn_dist.models import FPCN, build_model
from fpcn_dist.models.cost import datasheet_flops, model_flops
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe, TrainConfig
from fpcn_dist.tasks import Task, build_task
from fpcn_dist.training.engine.optim import build_optimizer

CLASSES = 3
NAMES = {"classify": "plain classifier", "contrast": "FPCN"}


class Setting(NamedTuple):
    backbone: str
    crop: int
    """Side of the images in pixels."""
    device: torch.device


def make_recipe(task: str, setting: Setting) -> Recipe:
    on_gpu = setting.device.type == "cuda"
    return Recipe.model_validate(
        {
            "task": task,
            "data": DataConfig(resize=setting.crop, crop=setting.crop),
            "model": ModelConfig(backbone=setting.backbone, pretrained=False),
            "train": TrainConfig(precision="bf16" if on_gpu else "fp32", channels_last=on_gpu),
        }
    )


def make_batch(images: int, crop: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, crop, crop, generator=generator).to(device)
    index = torch.arange(images, device=device)
    return Batch(pixels, index % CLASSES, index, torch.zeros_like(index), index.new_zeros(images, 3))


class Training:
    """A task, its optimizer, and a batch that it is trained on again and again."""

    def __init__(self, recipe: Recipe, batch: Batch) -> None:
        self.task: Task = build_task(recipe, CLASSES).to(batch.images.device).train()
        if recipe.train.channels_last:
            self.task = self.task.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(recipe.optim, self.task)
        self.batch = batch

    def step(self) -> None:
        self.task(self.batch, 0).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def check(setting: Setting) -> float:
    """Relative difference of FPCN's loss over pairs from the reference's, in float64, on a few images."""
    batch = make_batch(6, setting.crop, setting.device)
    task = Training(make_recipe("contrast", setting), batch).task
    model = task.model
    assert isinstance(model, FPCN)
    features: list[Tensor] = []
    model.backbone.register_forward_hook(lambda *call: features.append(call[-1]))
    with torch.no_grad():
        loss = task(batch, 0).parts["class_loss"]
        pooled, _, _ = reference.masked_pool(features[0].double(), theta=model.config.theta)
        head = PairHead(*(t.double() for t in PairHead.of(model.fuse_in, model.fuse_out, model.classifier)))
        expected = reference.pair_contrast(pooled, batch.labels, head)
    error = float((loss - expected).abs() / expected.abs())
    if not error <= 1e-4:
        raise SystemExit(f"FPCN's loss is off by {error:.1e} from the reference")
    return error


def compare(setting: Setting, images: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of the steps of the plain classifier and of FPCN, which take turns."""
    batch = make_batch(images, setting.crop, setting.device)
    steps = {name: Training(make_recipe(task, setting), batch).step for task, name in NAMES.items()}
    return milliseconds(steps, repeats, "eager")


def ratio_of(ours: list[float], plain: list[float]) -> Spread:
    """Of each step to the classifier's beside it."""
    return Spread.of([our / their for our, their in zip(ours, plain, strict=True)])


def predict(batches: list[int], channels: int = 2048, crop: int = 448) -> list[dict[str, Any]]:
    from benchmarks._predicted import masked_pool_work, pair_contrast_work, show_prediction

    config = ModelConfig(backbone="resnet101", pretrained=False)
    flops = model_flops(build_model(config, CLASSES, task="classify"), crop)
    peak = datasheet_flops("NVIDIA H200", "bf16")
    assert peak is not None
    sections = {}
    for batch in batches:
        forward, backward = masked_pool_work(batch, channels, crop // 32, config.theta)
        sections[f"B {batch} FPCN adds"] = [
            *forward,
            *backward,
            *pair_contrast_work(batch, CLASSES, channels, config.hidden, rounded=True),
        ]
    figures = show_prediction(sections, "masked_pool of bfloat16 features in channels_last, pair_contrast in float16.")
    for batch in batches:
        milliseconds = 3 * flops * batch / peak * 1e3
        print(
            f"B {batch}: the backbone's 3 x {flops / 1e9:.1f} GFLOP an image (the backward pass counts twice) take at "
            f"least {milliseconds:.1f} ms at the datasheet's {peak / 1e12} TFLOP/s (bfloat16)"
        )
        figures.append({"section": f"B {batch} backbone", "at_least_ms": milliseconds})
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Time FPCN's training step beside the plain classifier's.")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--backbone", default="resnet101" if on_gpu else "resnet18")
    parser.add_argument("--crop", type=positive, default=448 if on_gpu else 96, help="side of the images in pixels")
    parser.add_argument("--batches", type=positive, nargs="+", default=[42, 128] if on_gpu else [42])
    options = arguments(parser, "step", repeats=50 if on_gpu else 15)
    setting = Setting(options.backbone, options.crop, options.device)
    error = check(setting)
    print(f"FPCN's loss of 6 images: within {error:.1e} of the reference's, from the same features")
    rows, figures = [], []
    for images in options.batches:
        times = compare(setting, images, options.repeats)
        plain = times[NAMES["classify"]]
        for name, values in times.items():
            spread = Spread.of(values)
            ratio = ratio_of(values, plain)
            compared = "-" if values is plain else f"{ratio.median_ms:.3f} ({ratio.min_ms:.3f} - {ratio.max_ms:.3f})"
            rows.append([str(images), name, str(spread), compared, f"{images / spread.median_ms * 1e3:.0f}"])
            figures.append({"images": images, "side": name, "milliseconds": values, "ratio": ratio.median_ms})
    described = f"{options.backbone}, {options.crop} px, " + ("bfloat16, channels_last" if on_gpu else "float32")
    show(
        f"Training step: {described}; {options.repeats} repeats, interleaved\n{machine(options.device)}",
        ["images", "side", "ms (min - max)", "ratio (min - max)", "images/s"],
        rows,
        left=2,
        caption="ratio: of a step to the classifier's beside it",
    )
    report: dict[str, object] = {"machine": machine(options.device), "setting": described, "rows": figures}
    if not on_gpu:
        report["predicted_h200"] = predict([42, 256])
    write_json(options.json, report)
