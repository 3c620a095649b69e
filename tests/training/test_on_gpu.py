"""What only a CUDA device can show of data and training (of kernels: kernels/test_on_gpu.py). ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.recipe.schema import DataConfig
from tests.helpers.backends import BACKENDS
from tests.helpers.launching import command, losses

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_decoding_gives_the_images_of_the_cpu(rocks, backend):
    config = DataConfig(backend=backend, resize=72, crop=64, classes_per_batch=None, images_per_class=4)
    manifest = build_manifest(rocks, config, seed=0)
    batches = [
        next(TrainLoader(manifest, config, 0, rank=0, world_size=1, device=device))
        for device in (CUDA, torch.device("cpu"))
    ]
    assert torch.equal(batches[0].image_ids.cpu(), batches[1].image_ids)
    difference = (batches[0].images.cpu() - batches[1].images).abs() * 255 * 0.225
    assert difference.mean() < 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fit", ["squeeze", "pad", "short_side"])
def test_augmented_views_of_a_gpu_are_those_of_the_cpu(rocks, backend, fit):
    augment = {"random_resized_crop": (0.3, 1.0), "brightness": 0.3, "hue": 0.1, "erasing": 0.5}
    values = {"resize": 72, "crop": 64, "classes_per_batch": None, "images_per_class": 4, "fit": fit}
    config = DataConfig.model_validate(values | {"backend": backend, "augment": augment})
    manifest = build_manifest(rocks, config, seed=0)
    loaders = [
        TrainLoader(manifest, config, 0, rank=0, world_size=1, device=device) for device in (CUDA, torch.device("cpu"))
    ]
    for _ in range(3):
        on_gpu, on_cpu = (next(loader) for loader in loaders)
        difference = (on_gpu.images.cpu() - on_cpu.images).abs() * 255 * 0.225
        assert difference.mean() < 1.0


def test_batches_of_pinned_copies_are_those_of_the_cpu(rocks):
    """Ten batches in a row: a pinned buffer that is used again too early would show."""
    config = DataConfig(backend="torchvision", resize=72, crop=64, classes_per_batch=None, images_per_class=4)
    manifest = build_manifest(rocks, config, seed=0)
    loaders = [
        TrainLoader(manifest, config, 0, rank=0, world_size=1, device=device) for device in (CUDA, torch.device("cpu"))
    ]
    held = [[next(loader).images for _ in range(10)] for loader in loaders]
    for on_gpu, on_cpu in zip(*held, strict=True):
        assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-6)
    for loader in loaders:
        loader.close()


def test_training_in_bf16(runs):
    overrides = ("--train.precision", "bf16", "--train.channels-last", "True", "--model.norm", "batch")
    run = runs.train("gpu", *overrides, launcher="python")
    assert len(losses(run)) == 12
    resumed = runs.run([*command("python"), *runs.train_argv(run, *overrides)])
    assert "test accuracy" in resumed.stdout
