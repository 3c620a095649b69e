"""What only a CUDA device can show of data and training (of kernels: kernels/test_on_gpu.py). ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.data.manifest import build_manifest
from fpcn_dist.recipe.schema import DataConfig
from tests.helpers.launching import command, losses

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def test_gpu_decoding_gives_the_images_of_the_cpu(rocks):
    config = DataConfig(resize=72, crop=64, classes_per_batch=None, images_per_class=4)
    manifest = build_manifest(rocks, config, seed=0)
    batches = [
        next(TrainLoader(manifest, config, 0, rank=0, world_size=1, device=device))
        for device in (CUDA, torch.device("cpu"))
    ]
    assert torch.equal(batches[0].image_ids.cpu(), batches[1].image_ids)
    difference = (batches[0].images.cpu() - batches[1].images).abs() * 255 * 0.225
    assert difference.mean() < 1.0


def test_training_in_bf16(runs):
    overrides = ("--train.precision", "bf16", "--train.channels-last", "True", "--model.norm", "batch")
    run = runs.train("gpu", *overrides, launcher="python")
    assert len(losses(run)) == 12
    resumed = runs.run([*command("python"), *runs.train_argv(run, *overrides)])
    assert "test accuracy" in resumed.stdout
