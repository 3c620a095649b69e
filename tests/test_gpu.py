"""What only a CUDA device can show: operations in every dtype, GPU decoding, a training run. ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch
from fpcn_kernels import masked_pool, pair_contrast, reference

from fpcn_dist.config import DataConfig
from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.data.manifest import build_manifest
from tests.launching import command, losses

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CUDA = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double().cpu() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("region", ["threshold", "largest"])
def test_masked_pool(dtype, region):
    features = torch.randn(8, 96, 14, 14).to(dtype)
    expected = reference.masked_pool(features.double(), region=region)
    found = masked_pool(features.to(CUDA, memory_format=torch.channels_last), region=region)
    assert torch.equal(found.mask.cpu().double(), expected.mask)
    assert error(found.pooled, expected.pooled) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pairs", [None, 100])
def test_pair_contrast(dtype, pairs):
    torch.manual_seed(0)
    shapes = [(24, 32), (16, 64), (16,), (32, 16), (32,), (5, 32), (5,)]
    operands = [torch.randn(shape).to(dtype) * 0.3 for shape in shapes]
    labels = torch.arange(24) % 5
    wide = [t.double().requires_grad_() for t in operands]
    expected = reference.pair_contrast(wide[0], labels, *wide[1:], pairs=pairs, dropout=0.1, seed=3)
    expected.backward()
    on_gpu = [t.to(CUDA).requires_grad_() for t in operands]
    found = pair_contrast(on_gpu[0], labels.to(CUDA), *on_gpu[1:], pairs=pairs, dropout=0.1, seed=3)
    found.backward()
    assert error(found, expected) < TOLERANCE[dtype]
    for ours, theirs in zip(on_gpu, wide, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert error(ours.grad, theirs.grad) < TOLERANCE[dtype]


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
