"""When the kernels of masked_pool pool: the order of programs, the lag, the size of the second-level cache."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fpcn_kernels import _launch, masked_pool, reference
from fpcn_kernels.pooling import backend_triton, plan
from triton.runtime.interpreter import InterpreterBuilder

MIB = 2**20
BF16_14 = (1, 2048, 14, 14), torch.bfloat16
interpreted = pytest.mark.skipif(not _launch.interpreting(), reason="needs Triton's interpreter")


def _features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pool(features: torch.Tensor, region: str = "threshold"):
    return masked_pool(features, theta=0.2, region=region, backend="triton")


def _assert_matches_float64(features: torch.Tensor, got) -> None:
    expected = reference.masked_pool(features.double(), theta=0.2, region="threshold", companion=None)
    for found, value in zip(got, expected, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=0, atol=1e-5)


@pytest.fixture
def device_of(monkeypatch):
    """Gives a CUDA device with so many multiprocessors and so many MiB of second-level cache."""

    def make(multiprocessors: int, l2_mib: float) -> torch.device:
        properties = SimpleNamespace(multi_processor_count=multiprocessors, L2_cache_size=int(l2_mib * MIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        _launch.multiprocessors.cache_clear()
        _launch.l2_bytes.cache_clear()
        return torch.device("cuda", 0)

    yield make
    _launch.multiprocessors.cache_clear()
    _launch.l2_bytes.cache_clear()


def _planned(shape, dtype, device, layout=torch.channels_last):
    view = plan.view(torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout))
    config = plan.forward_configurations(view, device)[0]
    return view, config, plan.lag(view, config, device)


@pytest.mark.parametrize(
    "multiprocessors, l2_mib, channels, lag",
    [
        (132, 50, 64, 31),  # H100: a quarter more than the 24.75 images in work
        (108, 40, 64, 24),  # A100: what the L2 holds beside the 20.25 images in work
        (10, 2, 32, 1),  # A2: with half the tiles
        (72, 6, 64, None),  # A10: read twice
    ],
)
def test_tile_and_lag_follow_the_cache(device_of, multiprocessors, l2_mib, channels, lag):
    device = device_of(multiprocessors, l2_mib)
    view, config, found = _planned(*BF16_14, device)
    assert (config["BC"], found) == (channels, lag)
    if found:
        in_work = multiprocessors * 6 * config["BC"] / 2048
        assert found >= in_work
        assert (found + in_work / 2) * view.image_bytes <= l2_mib * MIB * 2 / 3


def test_a_larger_cache_never_reads_twice_what_a_smaller_one_keeps(device_of):
    lags = [_planned(*BF16_14, device_of(132, mib))[2] or 0 for mib in range(1, 100, 3)]
    config_changes = [_planned(*BF16_14, device_of(132, mib))[1]["BC"] for mib in range(1, 100, 3)]
    kept = [bool(lag) for lag in lags]
    assert kept == sorted(kept) and not kept[0] and kept[-1]
    assert set(config_changes[kept.index(True) :]) == {32, 64}


@interpreted
@pytest.mark.parametrize("l2_mib, pooled_first", [(50, 3), (0.001, 0)])
def test_read_once_or_twice(l2_mib, pooled_first, device_of, monkeypatch):
    device = device_of(1, l2_mib)
    features = _features(5, 600, 7, 9)
    view = plan.view(features)
    config = plan.forward_configurations(view, device)[0]
    lag = plan.lag(view, config, device)
    assert 5 - (lag or 5) == pooled_first
    monkeypatch.setattr(plan, "lag", lambda *_: lag)
    with _launch.recording() as records:
        backend_triton.forward(features, None, 0.2, largest=False)
    assert records[1][1] == ((5 - pooled_first) * view.splits(config),)
    _assert_matches_float64(features, _pool(features))


def _in_order(monkeypatch, order_of) -> None:
    """Lets the interpreter run the programs of a launch in the order that ``order_of`` their number gives."""
    orders = {}
    set_grid_idx = InterpreterBuilder.set_grid_idx

    def set_reordered(builder, x, y, z):
        programs = builder.grid_dim[0]
        if programs not in orders:
            orders[programs] = order_of(programs)
        set_grid_idx(builder, orders[programs][x], y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_reordered)


def _shuffled(seed: int):
    return lambda programs: random.Random(seed).sample(range(programs), programs)


@interpreted
@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize(
    "order_of",
    [lambda n: range(n), lambda n: range(n)[::-1], _shuffled(1), _shuffled(2)],
    ids=["in order", "backwards", "shuffled", "shuffled again"],
)
@pytest.mark.parametrize("shape", [(5, 600, 7, 9), (5, 160, 14, 14)], ids=["one channel a run", "two channels a run"])
def test_programs_may_run_in_any_order(shape, order_of, lag, monkeypatch):
    features = _features(*shape)
    if shape[-1] == 14:
        features = features.bfloat16()
        assert plan.view(features).fold == 2
    expected = _pool(features)
    monkeypatch.setattr(plan, "lag", lambda *_: lag)
    _in_order(monkeypatch, order_of)
    got = _pool(features)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    _assert_matches_float64(features, got)


@interpreted
@pytest.mark.parametrize("order_of, left", [(lambda n: range(n), 0), (lambda n: range(n)[::-1], 4)])
def test_what_comes_too_early_is_left_to_the_second_launch(order_of, left, monkeypatch):
    """Backwards each of the four images that could be pooled in the first launch comes before its mask."""
    monkeypatch.setattr(plan, "lag", lambda *_: 1)
    _in_order(monkeypatch, order_of)
    launched = []
    monkeypatch.setattr(backend_triton, "launch", lambda *a, **c: (launched.append((a, c)), _launch.launch(*a, **c))[1])
    features = _features(5, 600, 7, 9)
    _pool(features)
    (_, _, _, _, counts, queue, *_), constants = launched[0]
    splits = plan.view(features).splits(constants)
    assert splits > 1
    assert int(counts[0]) == left * splits
    assert counts[1:].tolist() == [splits + 1] * 5
    assert sorted(queue[: left * splits].tolist()) == list(range(left * splits))


@pytest.mark.parametrize(
    "shape, dtype, fold",
    [
        ((1, 64, 14, 14), torch.bfloat16, 2),
        ((1, 64, 14, 14), torch.float32, 1),
        ((1, 63, 14, 14), torch.bfloat16, 1),
        ((1, 64, 7, 7), torch.float32, 4),
        ((1, 64, 16, 16), torch.bfloat16, 1),
        ((1, 64, 1, 13), torch.float16, 4),
    ],
)
def test_channels_are_folded_where_that_aligns_them(shape, dtype, fold):
    features = torch.empty(shape, dtype=dtype)
    assert plan.view(features).fold == fold
    assert plan.view(features.to(memory_format=torch.channels_last)).fold == 1


@interpreted
@pytest.mark.parametrize("shape", [(2, 64, 14, 14), (2, 600, 7, 7), (2, 4, 1, 13), (1, 4, 33, 33), (2, 12, 17, 15)])
def test_folded_channels_keep_apart(shape):
    """What pooling reads beyond a channel weighs nothing, also where it is largest."""
    features = _features(*shape).bfloat16()
    features[:, 1::2] *= 1e4
    assert plan.view(features).fold > 1
    got = _pool(features).pooled
    expected = reference.masked_pool(features.double(), theta=0.2, region="threshold", companion=None)[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
