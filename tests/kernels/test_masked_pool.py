from __future__ import annotations

import pytest
import torch
from fpcn_kernels import masked_pool
from hypothesis import given, settings
from hypothesis import strategies as st

VARIANTS = {
    "threshold": {"region": "threshold"},
    "largest": {"region": "largest"},
    "companion": {"region": "largest", "companion": True},
}


def _features(batch=3, channels=33, height=7, width=9, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).to(dtype)


def _arguments(variant, features, theta=0.0):
    arguments = {"theta": theta, **VARIANTS[variant]}
    if "companion" in arguments:
        batch, _, height, width = features.shape
        arguments["companion"] = _features(batch, 5, height, width, features.dtype, seed=1)
    return arguments


def _map(rows):
    """A feature map whose region above the mean is drawn with #."""
    return torch.tensor([[1.0 if pixel == "#" else 0.0 for pixel in row] for row in rows])[None, None].double()


def _spiral(size):
    """A one-pixel path with one-pixel walls, wound to the centre: the longest way that a label can have to travel."""
    inside = torch.zeros(size, size, dtype=torch.bool)
    row, column, step = 0, -1, (0, 1)
    lengths = [size, *[length for n in range(size - 1, 0, -2) for length in (n, n)]]
    for length in lengths:
        for _ in range(length):
            row, column = row + step[0], column + step[1]
            inside[row, column] = True
        step = (step[1], -step[0])
    return inside


@pytest.mark.parametrize("theta", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 33, 7, 9), (1, 1, 1, 1), (2, 4, 1, 13), (5, 8, 14, 14)])
def test_matches_reference(shape, variant, theta):
    features = _features(*shape).requires_grad_()
    arguments = _arguments(variant, features, theta)
    got, expected = masked_pool(features, **arguments), masked_pool(features, backend="reference", **arguments)
    for name in ("pooled", "mask", "area"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=1e-12, msg=name)
    weight = torch.randn_like(got.pooled)
    grads = [torch.autograd.grad((result.pooled * weight).sum(), features)[0] for result in (got, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    assert not got.mask.requires_grad and not got.area.requires_grad


def test_equations_by_hand():
    features = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [1.0, 3.0]]]])  # A = 1 2 4 9, mean 4
    for backend in ("torch", "reference"):
        pooled, mask, area = masked_pool(features, theta=0.5, backend=backend)
        assert mask.tolist() == [[[0.5, 0.5], [1.0, 1.0]]]
        assert area.tolist() == [0.75]
        assert pooled.tolist() == [[0.75 * (0.5 + 1 + 3 + 6) / 4, 0.75 * (1 + 3) / 4]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32(dtype, variant):
    # Small multiples of 1/8 are exact in every dtype, and so are their sums: the regions must agree exactly.
    features = (_features() * 8).round().clamp(-64, 64).div(8).to(dtype).requires_grad_()
    arguments = _arguments(variant, features, theta=0.25)
    if "companion" in arguments:
        arguments["companion"] = (arguments["companion"].float() * 8).round().div(8).to(dtype)
    got = masked_pool(features, **arguments)
    wide = features.detach().double().requires_grad_()
    expected = masked_pool(wide, backend="reference", **arguments)
    assert got.pooled.dtype == got.mask.dtype == got.area.dtype == torch.float32
    torch.testing.assert_close(got.mask.double(), expected.mask, rtol=0, atol=0)
    torch.testing.assert_close(got.pooled.double(), expected.pooled, rtol=1e-5, atol=1e-6)
    grad, expected_grad = (
        torch.autograd.grad(r.pooled.square().sum(), f)[0] for r, f in ((got, features), (expected, wide))
    )
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", ["threshold", "largest"])
def test_constant_map_is_all_inside(variant, layout, dtype):
    for value in (0.1, 1 / 3, -7.7, 0.0):
        for channels, height, width in ((33, 7, 9), (512, 13, 17)):
            features = torch.full((2, channels, height, width), value, dtype=dtype).contiguous(memory_format=layout)
            pooled, mask, area = masked_pool(features, region=variant, theta=0.5)
            assert (mask == 1).all() and (area == 1).all()
            torch.testing.assert_close(pooled.double(), features[..., 0, 0].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_strides_do_not_matter(variant):
    wide = _features(2, 33, 14, 18)
    features = wide[:, :, ::2, 1::2]
    arguments = _arguments(variant, features, theta=0.2)
    expected = masked_pool(features.contiguous(), **arguments)
    for view in (features, features.contiguous(memory_format=torch.channels_last), features.mT.contiguous().mT):
        view = view.detach().requires_grad_()
        got = masked_pool(view, **arguments)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
        got.pooled.sum().backward()
        if view.is_contiguous(memory_format=torch.channels_last):
            assert view.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_non_finite_image_affects_itself_only(variant, value):
    features = _features()
    clean = masked_pool(features, **_arguments(variant, features, theta=0.2))
    features[1, 4, 2, 3] = value
    for backend in ("torch", "reference"):
        got = masked_pool(features, **_arguments(variant, features, theta=0.2), backend=backend)
        assert got.pooled[1].isnan().all() and got.area[1].isnan() and (got.mask[1] == 1).all()
        for a, b in zip(got, clean, strict=True):
            torch.testing.assert_close(a[[0, 2]], b[[0, 2]], rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 15, 31, 64])
def test_spiral_is_one_region(size):
    spiral = _spiral(size)
    features = torch.stack([spiral, spiral.T, spiral.flip(0)])[:, None].double()
    if size > 2:  # cut at its middle: two regions, and the larger or the first of them is wanted
        middle = spiral.nonzero()[len(spiral.nonzero()) // 2]
        features = torch.cat([features, features[:1]])
        features[3, 0, middle[0], middle[1]] = 0
    got = masked_pool(features, region="largest").mask
    assert torch.equal(got[:3], features[:3, 0])
    assert torch.equal(got, masked_pool(features, region="largest", backend="reference").mask)


@pytest.mark.parametrize(
    "drawing, expected",
    [
        (["##..", "....", "..##"], ["##..", "....", "...."]),  # a tie goes to the first in row order
        ([".#...", "#..##", "...#."], [".....", "...##", "...#."]),  # diagonal neighbours connect
        (["...#", ".#.#", "##.."], ["....", ".#..", "##.."]),  # the larger region wins though it begins later
        (["#..#", ".##.", "...."], ["#..#", ".##.", "...."]),  # one region, joined by its corners
    ],
)
def test_largest_region_by_hand(drawing, expected):
    for backend in ("torch", "reference"):
        assert torch.equal(masked_pool(_map(drawing), region="largest", backend=backend).mask, _map(expected)[:, 0])


def test_companion_intersects_and_empty_intersection_is_the_full_map():
    features = torch.cat([_map(["##..", "##.."])] * 2)
    companion = torch.cat([_map([".##.", "...."]), _map(["..##", "..##"])])
    for backend in ("torch", "reference"):
        got = masked_pool(features, region="largest", companion=companion, backend=backend)
        assert torch.equal(got.mask, torch.cat([_map([".#..", "...."]), _map(["####", "####"])])[:, 0])
        assert got.area.tolist() == [0.125, 1.0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("variant", VARIANTS)
def test_operator_contract(variant):
    features = _features().requires_grad_()
    arguments = _arguments(variant, features, theta=0.1)
    positional = (features, arguments.get("companion"), 0.1, arguments["region"] == "largest")
    torch.library.opcheck(torch.ops.fpcn.masked_pool.default, positional)
    compiled = torch.compile(lambda f: masked_pool(f, **arguments), fullgraph=True, backend="aot_eager")
    first, second = masked_pool(features, **arguments), compiled(features)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(r.pooled.square().sum(), features)[0] for r in (first, second)]
    assert torch.equal(*grads)


def test_deterministic():
    features = _features(8, 64, 14, 14, torch.float32)
    first, second = (masked_pool(features, region="largest") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**31))
def test_largest_region_of_any_map(height, width, density, seed):
    generator = torch.Generator().manual_seed(seed)
    features = (torch.rand(4, 1, height, width, generator=generator) < density).double()
    got = masked_pool(features, region="largest")
    assert torch.equal(got.mask, masked_pool(features, region="largest", backend="reference").mask)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.99), st.permutations(range(4)), st.sampled_from(sorted(VARIANTS)), st.integers(0, 2**31))
def test_properties(theta, order, variant, seed):
    features = _features(4, 3, 5, 6, seed=seed)
    arguments = _arguments(variant, features)
    plain = masked_pool(features, **arguments)
    arguments["theta"] = theta
    got = masked_pool(features, **arguments)
    torch.testing.assert_close(got.area, theta + (1 - theta) * plain.area)
    mean_BC = features.mean((2, 3))
    expected = got.area[:, None] * (theta * mean_BC + (1 - theta) * plain.pooled / plain.area[:, None])
    torch.testing.assert_close(got.pooled, expected)
    if "companion" in arguments:
        arguments["companion"] = arguments["companion"][list(order)]
    permuted = masked_pool(features[list(order)], **arguments)
    for a, b in zip(permuted, got, strict=True):
        torch.testing.assert_close(a, b[list(order)], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features": torch.zeros(2, 3, 4)}, ValueError, r"features must have shape \[B, C, H, W\], got \[2, 3, 4\]"),
        ({"features": torch.zeros(2, 3, 4, 5).int()}, TypeError, r"features \[2, 3, 4, 5\] must be floating point"),
        ({"features": [1.0]}, TypeError, "features must be a tensor .* got list"),
        ({"features": torch.zeros(2, 0, 4, 5)}, ValueError, "must not be empty"),
        ({"theta": 1.0}, ValueError, "0 <= theta < 1, got 1.0"),
        ({"theta": -0.1}, ValueError, "theta"),
        ({"theta": "half"}, TypeError, "theta must be a number, got str"),
        ({"region": "biggest"}, ValueError, "region must be one of 'threshold', 'largest', got 'biggest'"),
        ({"companion": torch.zeros(2, 3, 4, 5)}, ValueError, "companion needs region='largest'"),
        (
            {"companion": torch.zeros(2, 3, 8, 10), "region": "largest"},
            ValueError,
            r"companion must have shape \[B, C2, H, W\] = \[2, 3, 4, 5\], got \[2, 3, 8, 10\]",
        ),
        ({"backend": "numpy"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, RuntimeError, "not available in this build"),
    ],
)
def test_errors(change, error, message):
    arguments = {"features": torch.zeros(2, 3, 4, 5), **change}
    with pytest.raises(error, match=message):
        masked_pool(arguments.pop("features"), **arguments)
