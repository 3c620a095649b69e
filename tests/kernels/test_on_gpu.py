"""The kernels as a GPU runs them: every dtype, the shapes of production, memory, CUDA graphs. ``pytest -m gpu``.

Inputs are fresh in every run; the seed is in the test's output, should one fail.
"""

from __future__ import annotations

import pytest
import torch
from fpcn_kernels import masked_pool, pair_contrast

from tests.helpers.pair_problems import gradients_of, make_problem, mapped

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
MIB = 2**20


@pytest.fixture
def fresh() -> int:
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print("seed", seed)
    return seed


def make_features(batch, channels, size, dtype, layout=torch.channels_last):
    """Small multiples of 1/8: sums are exact in every dtype, so all must find the same region."""
    features = torch.randn(batch, channels, size, size, device=CUDA).mul_(8).round_().clamp_(-32, 32).div_(8)
    return features.to(dtype, memory_format=layout).requires_grad_()


def pool_and_gradient(features, weight, backend, **options):
    got = masked_pool(features, theta=0.1, backend=backend, **options)
    return *got, torch.autograd.grad((got.pooled * weight).sum(), features)[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("region", ["threshold", "largest"])
@pytest.mark.parametrize("shape", [(5, 33, 7), (42, 2048, 14), (256, 2048, 14), (3, 64, 64)], ids=str)
def test_masked_pool(fresh, shape, region, dtype, layout):
    features = make_features(*shape, dtype, layout)
    weight = torch.randn(features.shape[:2], device=CUDA)
    expected = pool_and_gradient(features.detach().double().requires_grad_(), weight, "torch", region=region)
    got, again = (pool_and_gradient(features, weight, "triton", region=region) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for found, value, tolerance in zip(
        got, expected, (1e-5, 1e-7, 1e-6, max(1e-6, torch.finfo(dtype).eps)), strict=True
    ):
        assert (found - value).abs().max() <= tolerance * value.abs().max()


def test_masked_pool_allocates_no_second_map():
    features = make_features(256, 2048, 14, torch.bfloat16)
    weight = torch.ones(features.shape[:2], device=CUDA)
    pool_and_gradient(features, weight, "triton")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        masked_pool(features, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < features.nbytes / 10


def make_pairs(images, classes, dtype, seed, channels=2048, width=512):
    """Give a problem whose logits are of order one, as a trained network has them."""
    problem = make_problem(images, channels, width, classes, seed=seed)
    fan_in = {"fuse_in_weight": 2 * channels, "fuse_out_weight": width, "classifier_weight": channels}
    problem = mapped(problem, lambda name, values: (values * fan_in.get(name, 1) ** -0.5).to(CUDA, dtype))
    return {**problem, "labels": problem["labels"].to(CUDA)}


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "pairs": 30000, "seed": 3}], ids=["all", "random, dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("images, classes", [(41, 2), (336, 3), (336, 8), (336, 17), (200, 200), (64, 1000)])
def test_pair_contrast(fresh, images, classes, dtype, options):
    if "pairs" in options:
        options = {**options, "pairs": images**2 * 3 // 4}
    problem = make_pairs(images, classes, dtype, fresh)
    wide = mapped(problem, lambda name, values: values.double())
    expected = pair_contrast(**wide, **options, backend="torch")
    got, again = (pair_contrast(**problem, **options, backend="triton") for _ in range(2))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    expected = gradients_of(expected, wide)
    got, again = gradients_of(got, problem), gradients_of(again, problem)
    for name, value in expected.items():
        assert torch.equal(got[name], again[name]), name
        # A unit within rounding of zero may fall on either side of the relu: compare norms, not entries.
        error = (got[name].double() - value).norm() / value.norm()
        assert error < max(1e-4, torch.finfo(dtype).eps), name


@pytest.mark.parametrize("images, mib", [(4096, 1024), (16384, 2048)])
def test_memory_is_linear_in_the_images(images, mib):
    problem = make_pairs(images, 3, torch.float32, 0)
    gradients_of(pair_contrast(**problem, backend="triton"), problem)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = pair_contrast(**problem, backend="triton")
    assert all(gradient.isfinite().all() for gradient in gradients_of(loss, problem).values())
    assert torch.cuda.max_memory_allocated() - before < mib * MIB


@pytest.mark.parametrize("classes", [3, 200])
def test_capture_in_a_graph(fresh, classes):
    """What is captured computes anew from whatever lies in its inputs."""
    problem = make_pairs(84, classes, torch.float32, fresh)
    features = make_features(8, 2048, 14, torch.bfloat16)
    weight = torch.randn(features.shape[:2], device=CUDA)

    def run():
        loss = pair_contrast(**problem, dropout=0.2, seed=1, backend="triton")
        return loss.detach(), *gradients_of(loss, problem).values(), *pool_and_gradient(features, weight, "triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        problem["pooled"].mul_(0.5)
        features.mul_(-1)
    graph.replay()
    for got, expected in zip(captured, run(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
