from __future__ import annotations

import pytest
import torch
from fpcn_kernels import _launch, masked_pool

from tests.helpers.properties import given, settings, st

# Triton's interpreter runs the kernels where there is no GPU: tests/conftest.py.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The widest dtype of each backend, and how far its results may be from float64's.
WIDEST = {"torch": (torch.float64, 1e-12), "triton": (torch.float32, 1e-5)}

VARIANTS = {
    "threshold": {"region": "threshold"},
    "largest": {"region": "largest"},
    "companion": {"region": "largest", "companion": True},
}


def _features(batch=3, channels=33, height=7, width=9, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def _arguments(variant, features, theta=0.0):
    arguments = {"theta": theta, **VARIANTS[variant]}
    if "companion" in arguments:
        batch, _, height, width = features.shape
        arguments["companion"] = _features(batch, 5, height, width, features.dtype, seed=1)
    return arguments


def _map(rows):
    """A feature map whose region above the mean is drawn with #."""
    return torch.tensor([[1.0 if pixel == "#" else 0.0 for pixel in row] for row in rows], device=DEVICE)[None, None]


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


def _assert_matches_reference(features, arguments, backend, tolerance):
    wide = features.detach().double().requires_grad_()
    features = features.detach().requires_grad_()
    got = masked_pool(features, backend=backend, **arguments)
    expected = masked_pool(wide, backend="reference", **arguments)
    for name in ("pooled", "mask", "area"):
        found = getattr(got, name)
        assert found.dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), getattr(expected, name), rtol=0, atol=tolerance, msg=name)
    assert not got.mask.requires_grad and not got.area.requires_grad
    weight = torch.randn_like(expected.pooled)
    (grad,) = torch.autograd.grad((got.pooled * weight).sum(), features)
    (expected_grad,) = torch.autograd.grad((expected.pooled * weight).sum(), wide)
    assert grad.dtype == features.dtype
    rounding = 0 if features.dtype == WIDEST[backend][0] else torch.finfo(features.dtype).eps
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rounding, atol=tolerance)


@pytest.mark.parametrize("backend", WIDEST)
@pytest.mark.parametrize("theta", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 33, 7, 9), (1, 1, 1, 1), (2, 4, 1, 13), (5, 8, 14, 14), (2, 600, 7, 9)])
def test_matches_reference(shape, variant, theta, backend):
    dtype, tolerance = WIDEST[backend]
    features = _features(*shape, dtype)
    _assert_matches_reference(features, _arguments(variant, features, theta), backend, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_many_pixels(layout, dtype):
    features = _features(1, 3, 64, 64, dtype).contiguous(memory_format=layout)
    _assert_matches_reference(features, {"region": "largest", "theta": 0.1}, "triton", 1e-5)


@pytest.mark.parametrize("lag", [1, 3, None])
def test_pooling_may_come_early_or_late(lag, monkeypatch):
    # Several programs share an image; a GPU runs those of more than one image at once.
    from fpcn_kernels.pooling import plan

    monkeypatch.setattr(plan, "lag", lambda *_: lag)
    _assert_matches_reference(_features(5, 600, 7, 9, torch.float32), {"theta": 0.2}, "triton", 1e-5)


@pytest.mark.parametrize("backend", [*WIDEST, "reference"])
def test_equations_by_hand(backend):
    features = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [1.0, 3.0]]]])  # A = 1 2 4 9, mean 4
    pooled, mask, area = masked_pool(features.to(DEVICE), theta=0.5, backend=backend)
    assert mask.tolist() == [[[0.5, 0.5], [1.0, 1.0]]]
    assert area.tolist() == [0.75]
    assert pooled.tolist() == [[0.75 * (0.5 + 1 + 3 + 6) / 4, 0.75 * (1 + 3) / 4]]


@pytest.mark.parametrize("backend", WIDEST)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32(dtype, variant, backend):
    # Small multiples of 1/8 are exact in every dtype, and so are their sums: the regions must agree exactly.
    features = (_features() * 8).round().clamp(-64, 64).div(8).to(dtype)
    arguments = _arguments(variant, features, theta=0.25)
    if "companion" in arguments:
        arguments["companion"] = (arguments["companion"].float() * 8).round().div(8).to(dtype)
    _assert_matches_reference(features, arguments, backend, 2e-6)


@pytest.mark.parametrize(
    "backend, dtype",
    [(backend, dtype) for backend in WIDEST for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    + [("torch", torch.float64)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", ["threshold", "largest"])
def test_constant_map_is_all_inside(variant, layout, dtype, backend):
    for value, *shape in [(0.1, 33, 7, 9), (0.0, 33, 7, 9), (1 / 3, 512, 13, 17), (-7.7, 512, 13, 17)]:
        features = torch.full((1, *shape), value, dtype=dtype, device=DEVICE).contiguous(memory_format=layout)
        pooled, mask, area = masked_pool(features, region=variant, theta=0.5, backend=backend)
        assert (mask == 1).all() and (area == 1).all()
        torch.testing.assert_close(pooled.double(), features[..., 0, 0].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", WIDEST)
@pytest.mark.parametrize("variant", VARIANTS)
def test_strides_do_not_matter(variant, backend):
    dtype, tolerance = WIDEST[backend]
    features = _features(2, 33, 14, 18, dtype)[:, :, ::2, 1::2]
    arguments = {**_arguments(variant, features, theta=0.2), "backend": backend}
    expected = masked_pool(features.contiguous(), **arguments)
    views = [
        features,
        features.contiguous(memory_format=torch.channels_last),
        features.mT.contiguous().mT,
        features.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    for view in views:
        view = view.detach().requires_grad_()
        got = masked_pool(view, **arguments)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        got.pooled.sum().backward()
        assert view.grad.stride() == torch.empty_like(view).stride()
    channel = features[:, :1].expand(-1, 33, -1, -1)
    got, expected = masked_pool(channel, **arguments), masked_pool(channel.contiguous(), **arguments)
    torch.testing.assert_close(got.pooled, expected.pooled, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's
@pytest.mark.parametrize("backend", [*WIDEST, "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_non_finite_image_affects_itself_only(variant, value, backend):
    features = _features(dtype=torch.float32)
    arguments = {**_arguments(variant, features, theta=0.2), "backend": backend}
    clean = masked_pool(features, **arguments)
    places = [features, arguments["companion"]] if "companion" in arguments else [features]
    for place in places:
        before, place[1, 4, 2, 3] = place[1, 4, 2, 3].clone(), value
        got = masked_pool(features, **arguments)
        assert got.pooled[1].isnan().all() and got.area[1].isnan() and (got.mask[1] == 1).all()
        for a, b in zip(got, clean, strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
        place[1, 4, 2, 3] = before


@pytest.mark.parametrize("backend", WIDEST)
@pytest.mark.parametrize("size", [1, 2, 15, 31, 64])
def test_spiral_is_one_region(size, backend):
    spiral = _spiral(size).to(DEVICE)
    features = torch.stack([spiral, spiral.T, spiral.flip(0)])[:, None].float()
    if size > 2:  # cut at its middle: two regions, and the larger or the first of them is wanted
        middle = spiral.nonzero()[len(spiral.nonzero()) // 2]
        features = torch.cat([features, features[:1]])
        features[3, 0, middle[0], middle[1]] = 0
    got = masked_pool(features, region="largest", backend=backend).mask
    assert torch.equal(got[:3], features[:3, 0])
    assert torch.equal(got, masked_pool(features, region="largest", backend="reference").mask)


@pytest.mark.parametrize("backend", [*WIDEST, "reference"])
@pytest.mark.parametrize(
    "drawing, expected",
    [
        (["##..", "....", "..##"], ["##..", "....", "...."]),  # a tie goes to the first in row order
        ([".#...", "#..##", "...#."], [".....", "...##", "...#."]),  # diagonal neighbours connect
        (["...#", ".#.#", "##.."], ["....", ".#..", "##.."]),  # the larger region wins though it begins later
        (["#..#", ".##.", "...."], ["#..#", ".##.", "...."]),  # one region, joined by its corners
    ],
)
def test_largest_region_by_hand(drawing, expected, backend):
    assert torch.equal(masked_pool(_map(drawing), region="largest", backend=backend).mask, _map(expected)[:, 0])


@pytest.mark.parametrize("backend", [*WIDEST, "reference"])
def test_companion_intersects_and_empty_intersection_is_the_full_map(backend):
    features = torch.cat([_map(["##..", "##.."])] * 2)
    companion = torch.cat([_map([".##.", "...."]), _map(["..##", "..##"])])
    got = masked_pool(features, region="largest", companion=companion, backend=backend)
    assert torch.equal(got.mask, torch.cat([_map([".#..", "...."]), _map(["####", "####"])])[:, 0])
    assert got.area.tolist() == [0.125, 1.0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("backend", WIDEST)
@pytest.mark.parametrize("variant", VARIANTS)
def test_operator_contract(variant, backend):
    features = _features(dtype=WIDEST[backend][0]).requires_grad_()
    arguments = {**_arguments(variant, features, theta=0.1), "backend": backend}
    positional = (features, arguments.get("companion"), 0.1, arguments["region"] == "largest", backend)
    torch.library.opcheck(torch.ops.fpcn.masked_pool.default, positional)
    pooled, mask, area = masked_pool(features.detach(), **arguments)
    positional = (pooled, mask, area, 0.1, features.dtype, [0, 2, 3, 1], backend)
    torch.library.opcheck(torch.ops.fpcn.masked_pool_backward.default, positional)
    compiled = torch.compile(lambda f: masked_pool(f, **arguments), fullgraph=True, backend="aot_eager")
    first, second = masked_pool(features, **arguments), compiled(features)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(r.pooled.square().sum(), features)[0] for r in (first, second)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", WIDEST)
def test_deterministic(backend):
    features = _features(8, 64, 14, 14, torch.float32)
    first, second = (masked_pool(features, region="largest", backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", WIDEST)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**31))
def test_largest_region_of_any_map(backend, height, width, density, seed):
    generator = torch.Generator().manual_seed(seed)
    features = (torch.rand(2, 1, height, width, generator=generator) < density).float().to(DEVICE)
    got = masked_pool(features, region="largest", backend=backend)
    assert torch.equal(got.mask, masked_pool(features, region="largest", backend="reference").mask)


@pytest.mark.slow
@pytest.mark.parametrize("backend", WIDEST)
@settings(max_examples=10, deadline=None)
@given(st.floats(0, 0.99), st.permutations(range(3)), st.sampled_from(sorted(VARIANTS)), st.integers(0, 2**31))
def test_properties(backend, theta, order, variant, seed):
    dtype, tolerance = WIDEST[backend]
    features = _features(3, 3, 5, 6, dtype, seed)
    arguments = {**_arguments(variant, features), "backend": backend}
    plain = masked_pool(features, **arguments)
    arguments["theta"] = theta
    got = masked_pool(features, **arguments)
    torch.testing.assert_close(got.area, theta + (1 - theta) * plain.area, rtol=0, atol=tolerance)
    mean_BC = features.mean((2, 3))
    expected = got.area[:, None] * (theta * mean_BC + (1 - theta) * plain.pooled / plain.area[:, None])
    torch.testing.assert_close(got.pooled, expected, rtol=0, atol=tolerance)
    if "companion" in arguments:
        arguments["companion"] = arguments["companion"][list(order)]
    permuted = masked_pool(features[list(order)], **arguments)
    for a, b in zip(permuted, got, strict=True):
        torch.testing.assert_close(a, b[list(order)], rtol=0, atol=tolerance)


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
        (
            {"backend": "triton", "features": torch.zeros(2, 3, 4, 5).double()},
            RuntimeError,
            "they accumulate in float32",
        ),
        (
            {"backend": "triton", "features": torch.zeros(1, 1, 65, 64)},
            RuntimeError,
            r"backend 'triton': the kernels cannot run, as .* at most 4096 pixels .* got 65 x 64",
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {"features": torch.zeros(2, 3, 4, 5), **change}
    features = arguments.pop("features")
    if arguments.get("backend") == "triton":
        features = features.to(DEVICE)
    with pytest.raises(error, match=message):
        masked_pool(features, **arguments)


def test_kernels_need_a_gpu(monkeypatch):
    monkeypatch.setattr(_launch, "interpreting", lambda: False)
    _launch._hindrance.cache_clear()
    features = torch.zeros(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match=r"backend 'triton': .* the tensors are on cpu, not on a CUDA device"):
        masked_pool(features, backend="triton")
    assert masked_pool(features).pooled.shape == (2, 3)
    monkeypatch.undo()
    _launch._hindrance.cache_clear()
