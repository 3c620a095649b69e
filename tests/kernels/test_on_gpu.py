"""The kernels as a GPU runs them: every dtype, the shapes of production, memory, CUDA graphs. ``pytest -m gpu``.

Inputs are fresh in every run; the seed is in the test's output, should one fail.
"""

from __future__ import annotations

import pytest
import torch
from fpcn_kernels import masked_pool, pair_contrast

from benchmarks.gpu import convergence
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


def test_largest_region_is_the_same_a_hundred_times(fresh):
    """A race between the programs that join regions would show as a result that changes."""
    features = make_features(42, 2048, 14, torch.bfloat16)
    first = masked_pool(features, theta=0.1, region="largest", backend="triton")
    for _ in range(100):
        again = masked_pool(features, theta=0.1, region="largest", backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


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


@pytest.fixture
def high_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "seed": 3}], ids=["all", "dropout"])
@pytest.mark.parametrize("images, classes", [(41, 2), (336, 3), (336, 9), (336, 17), (200, 200), (64, 1000)])
def test_pair_contrast_at_high_precision(fresh, high_precision, images, classes, options):
    """Products of the matrix units: as close as their ten bits of mantissa allow, and the same in every run."""
    problem = make_pairs(images, classes, torch.float32, fresh)
    wide = mapped(problem, lambda name, values: values.double())
    expected = pair_contrast(**wide, **options, backend="torch")
    got, again = (pair_contrast(**problem, **options, backend="triton") for _ in range(2))
    assert torch.equal(got, again)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=0)
    expected = gradients_of(expected, wide)
    got, again = gradients_of(got, problem), gradients_of(again, problem)
    for name, value in expected.items():
        assert torch.equal(got[name], again[name]), name
        assert (got[name].double() - value).norm() / value.norm() < 1e-2, name


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("classes", [3, 200])
@pytest.mark.parametrize("label", [-100, -1, "classes"])
def test_label_out_of_range_makes_the_loss_nan(label, classes, precision):
    problem = make_pairs(84, classes, torch.float32, 0)
    problem["labels"][17] = classes if label == "classes" else label
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert pair_contrast(**problem, backend="triton").isnan()
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("images, mib", [(4096, 1024), (16384, 2048)])
def test_memory_is_linear_in_the_images(images, mib):
    problem = make_pairs(images, 3, torch.float32, 0)
    gradients_of(pair_contrast(**problem, backend="triton"), problem)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = pair_contrast(**problem, backend="triton")
    assert all(gradient.isfinite().all() for gradient in gradients_of(loss, problem).values())
    assert torch.cuda.max_memory_allocated() - before < mib * MIB


def captured(run):
    """A graph of what ``run`` launches, and its results, which a replay computes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("classes", [3, 200])
def test_capture_in_a_graph(fresh, classes):
    """What is captured computes anew from whatever lies in its inputs."""
    problem = make_pairs(84, classes, torch.float32, fresh)
    features = make_features(8, 2048, 14, torch.bfloat16)
    weight = torch.randn(features.shape[:2], device=CUDA)

    def run():
        loss = pair_contrast(**problem, dropout=0.2, seed=1, backend="triton")
        return loss.detach(), *gradients_of(loss, problem).values(), *pool_and_gradient(features, weight, "triton")

    graph, results = captured(run)
    with torch.no_grad():
        problem["pooled"].mul_(0.5)
        features.mul_(-1)
    graph.replay()
    for got, expected in zip(results, run(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_several_calls_in_a_graph(fresh, precision):
    """Batches of several sizes, forward and backward, one after the other in memory that they share; replayed twice."""
    problems = [make_pairs(images, 3, torch.float32, fresh) for images in (84, 42, 41)]
    maps = [make_features(images, 2048, 14, torch.bfloat16) for images in (42, 40, 3)]
    weights = [torch.randn(features.shape[:2], device=CUDA) for features in maps]

    def run():
        results = []
        for problem, features, weight in zip(problems, maps, weights, strict=True):
            results += pool_and_gradient(features, weight, "triton", region="largest")
            loss = pair_contrast(**problem, backend="triton")
            results += [loss.detach(), *gradients_of(loss, problem).values()]
        return results

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        expected = run()
        graph, results = captured(run)
        for _ in range(2):
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_small_fpcn_learns_as_with_pytorch():
    """200 steps on synthetic photographs: the curves differ by less than those of other seeds do."""
    curves = convergence.all_curves(convergence.photographs(96, 64, CUDA), seeds=4)
    for losses in curves.values():
        assert convergence.windows(losses)[:, -1].max() < 0.3
    for way in convergence.WAYS:
        assert convergence.distance_in_spreads(curves[way.name], curves[convergence.PYTORCH.name]) <= 1, way.name
