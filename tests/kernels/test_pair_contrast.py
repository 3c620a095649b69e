from __future__ import annotations

import sys

import pytest
import torch
from fpcn_kernels import PairHead, pair_contrast, reference
from fpcn_kernels.pairs import assemble, backend_torch
from fpcn_kernels.pairs.random import PairDropout, RandomPairs, RandomShifts, mix

from tests.helpers.pair_problems import (
    LISTED,
    PARAMETERS,
    assert_same,
    changed,
    gradients_of,
    make_problem,
    mapped,
    operands,
)
from tests.helpers.properties import given, settings, st


def _list_or_tiles(monkeypatch, listed):
    """Which of its two ways the PyTorch backend takes for random pairs."""
    monkeypatch.setattr(sys.modules["fpcn_kernels.pairs.operator"], "is_cheaper_listed", lambda *sizes: listed)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("pairs", [None, 3, LISTED], ids=["all", "random", "listed"])
@pytest.mark.parametrize("images, channels, width, classes", [(2, 33, 5, 2), (9, 7, 12, 3), (4, 6, 3, 17)])
def test_matches_reference(images, channels, width, classes, pairs, activation, dropout):
    problem = make_problem(images, channels, width, classes)
    options = {"activation": activation, "dropout": dropout, "pairs": pairs, "seed": -5}
    assert_same(problem, pair_contrast(**problem, **options), pair_contrast(**problem, **options, backend="reference"))


@pytest.mark.parametrize("images, pairs", [(1, None), (1, 1), (41, None), (41, 200)])
def test_matches_reference_at_odd_batches(images, pairs):
    problem = make_problem(images, 33, 10, 3)
    assert_same(
        problem, pair_contrast(**problem, pairs=pairs), pair_contrast(**problem, pairs=pairs, backend="reference")
    )


def test_equations_by_hand():
    # One channel, one hidden unit: x = (1, 2), h = relu(2 a - b), X_f = 3 h + 1, logits = (x X_f, 0).
    column = [[2.0, -1.0]], [0.0], [[3.0]], [1.0], [[1.0], [0.0]], [0.0, 0.0]
    head = PairHead(*map(torch.tensor, column))
    pooled, labels = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
    logits = {(0, 0): (4, 4), (0, 1): (1, 2), (1, 0): (20, 10), (1, 1): (14, 14)}  # by pair: x_a X_f, x_b X_f
    expected = 0.0
    for pair, sides in logits.items():
        for image, logit in zip(pair, sides, strict=True):
            expected += float(torch.tensor(float(logit if image else -logit)).exp().log1p()) / 8
    # Pair (0, 1): h = relu(2 - 2) = 0; pair (1, 0): h = 3, X_f = 10.
    for backend in ("torch", "reference"):
        assert float(pair_contrast(pooled, labels, head, backend=backend)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("count", [1, 17, 35, 36])
def test_both_ways_of_random_pairs(monkeypatch, count, listed):
    problem = make_problem(6, 5, 4, 3)
    expected = pair_contrast(**problem, pairs=count, dropout=0.2, backend="reference")
    _list_or_tiles(monkeypatch, listed)
    assert_same(problem, pair_contrast(**problem, pairs=count, dropout=0.2), expected)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"activation": "identity"}])
@pytest.mark.parametrize("shifts", [1, 4, 9])
def test_shifts_match_the_reference(monkeypatch, shifts, options):
    problem = make_problem(9, 7, 12, 3)
    options = {"shifts": shifts, "seed": -5, **options}
    for tile, scores in ((2**20, 2**26), (5 * 8 * 12, 8 * 9 * 3 * 2)):
        monkeypatch.setitem(backend_torch._TILE_BYTES, "cpu", tile)
        monkeypatch.setattr(backend_torch, "_SCORES_BYTES", scores)
        expected = pair_contrast(**problem, **options, backend="reference")
        assert_same(problem, pair_contrast(**problem, **options), expected)


def test_shifts_are_unbiased(monkeypatch):
    """The mean of loss and gradients over all single shifts is that of all pairs; and no shift is preferred."""
    problem = make_problem(7, 5, 4, 3)
    assert_same(problem, pair_contrast(**problem, shifts=7), pair_contrast(**problem))
    losses = []
    for shift in range(7):
        monkeypatch.setattr(
            RandomShifts, "partners", lambda self, own, cols, *, own_is_a, s=shift: (own + (s if own_is_a else -s)) % 7
        )
        losses.append(pair_contrast(**problem, shifts=1))
    monkeypatch.undo()
    assert_same(problem, torch.stack(losses).mean(), pair_contrast(**problem))
    chosen = torch.stack([RandomShifts(2, torch.tensor(seed), 7).shift_J for seed in range(2000)])
    assert (chosen[:, 0] != chosen[:, 1]).all()
    frequency = chosen.flatten().bincount(minlength=7) / 2000
    # Five standard deviations of a share of 2 / 7 in 2,000 draws.
    assert (frequency - 2 / 7).abs().max() < 5 * (2 / 7 * 5 / 7 / 2000) ** 0.5


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"shifts": 0}, ValueError, "shifts must be at least 1, got 0"),
        ({"shifts": 2.0}, TypeError, "shifts must be None or an int, got float"),
        ({"shifts": 6}, ValueError, "shifts 6 exceeds the 5 images of the batch"),
        ({"shifts": 2, "pairs": 3}, ValueError, "pairs and shifts exclude each other"),
    ],
)
def test_shifts_that_there_are_not(options, error, message):
    with pytest.raises(error, match=message):
        pair_contrast(**make_problem(5, 4, 3, 2), **options)


def test_all_random_pairs_are_all_pairs():
    problem = make_problem(7, 5, 4, 3)
    assert_same(problem, pair_contrast(**problem, pairs=49), pair_contrast(**problem))


@pytest.mark.parametrize("pairs", [None, 60, torch.randint(11, (40, 2), generator=torch.Generator().manual_seed(0))])
def test_tiling_does_not_matter(monkeypatch, pairs):
    problem = make_problem(11, 6, 5, 4)
    options = {"pairs": pairs, "dropout": 0.3, "seed": 9}
    for tile, block in ((1, 1), (5 * 8 * 12, 700), (10**6, 2000), (3000, 10**6)):
        expected = pair_contrast(**problem, **options)
        with monkeypatch.context() as patch:
            patch.setitem(backend_torch._TILE_BYTES, "cpu", tile)
            patch.setitem(assemble._BLOCK_BYTES, "cpu", block)
            got = pair_contrast(**problem, **options)
        assert_same(problem, got, expected, tolerance=1e-13)


@pytest.mark.parametrize("pairs", [None, 500, torch.arange(60).view(30, 2)], ids=["all", "random", "listed"])
def test_deterministic_and_equal_without_gradients(pairs):
    problem = make_problem(60, 33, 17, 5, torch.float32)
    options = {"pairs": pairs, "dropout": 0.5, "seed": torch.tensor(3)}
    first, second = (pair_contrast(**problem, **options) for _ in range(2))
    assert torch.equal(first, second)
    gradients = gradients_of(first, problem), gradients_of(second, problem)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    with torch.no_grad():
        assert torch.equal(pair_contrast(**problem, **options), first)
    with torch.inference_mode():
        assert torch.equal(pair_contrast(**problem, **options), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairs", [None, LISTED], ids=["all", "listed"])
def test_low_precision_accumulates_in_float32(dtype, pairs):
    problem = make_problem(9, 33, 12, 3, dtype)
    wide = mapped(problem, lambda name, values: values.double())
    got, expected = pair_contrast(**problem, pairs=pairs), pair_contrast(**wide, pairs=pairs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    got, expected = gradients_of(got, problem), gradients_of(expected, wide)
    for name, value in expected.items():
        assert got[name].dtype == dtype
        atol = float(value.abs().max()) * max(torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(got[name].double(), value, rtol=0, atol=atol)


def test_dtypes_mix_and_autocast_does_not_round():
    problem = make_problem(5, 8, 6, 3, torch.float32)
    expected = pair_contrast(**problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pair_contrast(**problem), expected)
    problem["pooled"] = problem["pooled"].detach().bfloat16().requires_grad_()
    gradients = gradients_of(pair_contrast(**problem), problem)
    assert gradients["pooled"].dtype == torch.bfloat16 and gradients["fuse_in_weight"].dtype == torch.float32


def test_float16_gradients_survive_under_a_loss_scale():
    problem = make_problem(3, 4, 4, 2)
    tiny = 1e-7
    small = {"fuse_in_weight": 0.01, "fuse_out_weight": 0.01}
    problem = mapped(problem, lambda name, values: values * small.get(name, 1))
    expected = gradients_of(pair_contrast(**problem) * tiny, problem)["pooled"] * 2**20
    half = {**problem, "pooled": problem["pooled"].detach().half().requires_grad_()}
    got = gradients_of(pair_contrast(**half) * tiny * 2**20, half)["pooled"]
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max()))
    assert got.count_nonzero() == got.numel()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["pooled", *PARAMETERS])
def test_non_finite_is_never_silent(name, value):
    problem = make_problem(5, 4, 6, 3)
    with torch.no_grad():
        operands(problem)[name].view(-1)[-1] = value
    # The last image is in none of the listed pairs; relu hides a bias of -inf.
    for options in ({}, {"pairs": LISTED}, {"pairs": 2}, {"dropout": 0.9}):
        loss = pair_contrast(**problem, **options)
        assert loss.isnan()
        assert all(gradient.isnan().any() for gradient in gradients_of(loss, problem).values())
        assert pair_contrast(**problem, **options, backend="reference").isnan()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("pairs", [None, 6, LISTED], ids=["all", "random", "listed"])
def test_operator_contract(pairs):
    problem = make_problem(4, 5, 6, 3, torch.float32)
    seed = torch.tensor(1)
    listed, count = (pairs, None) if isinstance(pairs, torch.Tensor) else (None, pairs)
    positional = (
        *operands(problem).values(),
        problem["labels"],
        seed,
        listed,
        count,
        None,
        True,
        0.2,
        "auto",
        None,
        "torch",
        True,
    )
    torch.library.opcheck(torch.ops.fpcn.pair_contrast.default, positional)

    def run():
        return pair_contrast(**problem, pairs=pairs, seed=seed, dropout=0.2) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    first, second = run(), compiled()
    assert torch.equal(first, second)
    first, second = gradients_of(first, problem), gradients_of(second, problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)), st.sampled_from(["relu", "identity"]), st.integers(0, 2**31))
def test_permuting_the_images_permutes_their_gradients(order, activation, seed):
    problem, order = make_problem(6, 5, 4, 3, seed=seed), list(order)
    loss = pair_contrast(**problem, activation=activation)
    expected = gradients_of(loss, problem)
    pooled = problem["pooled"].detach()[order].requires_grad_()
    permuted = {**problem, "pooled": pooled, "labels": problem["labels"][order]}
    permuted_loss = pair_contrast(**permuted, activation=activation)
    torch.testing.assert_close(permuted_loss, loss)
    for name, value in gradients_of(permuted_loss, permuted).items():
        torch.testing.assert_close(value, expected[name][order] if name == "pooled" else expected[name])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.data())
def test_lists_add_up(length, data):
    problem = make_problem(6, 5, 4, 3)
    index = st.tuples(st.integers(0, 5), st.integers(0, 5))
    pairs = torch.tensor(data.draw(st.lists(index, min_size=length + 1, max_size=length + 8)))
    first, rest = pairs[:length], pairs[length:]
    parts = pair_contrast(**problem, pairs=first) * len(first) + pair_contrast(**problem, pairs=rest) * len(rest)
    assert_same(problem, pair_contrast(**problem, pairs=pairs), parts / len(pairs))


@pytest.mark.parametrize("images", [1, 2, 3, 16, 41])
def test_random_pairs_are_distinct_and_the_reference_s(images):
    for seed in (0, -1, 2**40 + 3):
        every = RandomPairs(images**2, torch.tensor(seed), images)
        a, b = every.listed(slice(0, images**2))
        pairs = list(zip(a.tolist(), b.tolist(), strict=True))
        assert len(set(pairs)) == images**2
        assert pairs == [reference.random_pair(index, seed, images) for index in range(images**2)]
        count = images**2 // 3 + 1
        some = RandomPairs(count, torch.tensor(seed), images)
        grid = torch.arange(images)
        chosen = some.contain(grid[:, None], grid)
        assert chosen.sum() == count and chosen[a[:count], b[:count]].all()


def test_random_pairs_are_even():
    """Over many seeds every ordered pair of 7 images is chosen about equally often: 10 of 49, 1,000 times."""
    counts = torch.zeros(7, 7)
    for seed in range(1000):
        a, b = RandomPairs(10, torch.tensor(seed), 7).listed(slice(0, 10))
        counts[a, b] += 1
    mean, deviation = 1000 * 10 / 49, (1000 * 10 / 49 * 39 / 49) ** 0.5
    assert ((counts - mean).abs() < 4.5 * deviation).all()


def test_dropout_is_the_reference_s_and_fair():
    dropout = PairDropout(0.25, torch.tensor(11), 40, 64, torch.float64)
    index = torch.arange(40)
    kept = dropout(index[:, None], index)  # [40, 40, 64]
    assert torch.equal(kept, dropout(index[:, None].expand(40, 40), index.expand(40, 40)))
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.75}
    for a, b, unit in ((0, 0, 0), (3, 17, 5), (17, 3, 5), (39, 39, 63)):
        assert bool(kept[a, b, unit]) == (reference.dropout_word(11, a, b, unit) >= 2**30)
    # 102,400 draws; every marginal and the agreement of neighbours within 5 standard deviations.
    kept = (kept > 0).double()
    for sample in (kept.mean((1, 2)), kept.mean((0, 2)), kept.mean((0, 1))):
        assert ((sample - 0.75).abs() < 5 * (0.1875 / (kept.numel() / len(sample))) ** 0.5).all()
    for shifted in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2), kept.transpose(0, 1)):
        both = (kept * shifted).mean()
        assert abs(float(both) - 0.5625) < 0.01
    other = PairDropout(0.25, torch.tensor(12), 40, 64, torch.float64)(index[:, None], index) > 0
    assert abs(float((kept * other).mean()) - 0.5625) < 0.01


def test_hash_known_words():
    words = [0, 1, 2, 0x7FFFFFFF, 0xFFFFFFFF, 0x12345678]
    assert mix(torch.tensor(words)).tolist() == [reference.mix(word) for word in words]
    counters = mix(torch.arange(2**17))
    assert len(counters.unique()) == 2**17 and counters.min() >= 0 and counters.max() < 2**32


def test_hash_flips_half_of_the_bits():
    bits = torch.arange(32)
    words = torch.randint(2**32, (2**14, 1), generator=torch.Generator().manual_seed(0))
    flipped = mix(words) ^ mix(words ^ (1 << bits))  # [word, input bit]
    share = (flipped[..., None] >> bits & 1).double().mean(0)  # [input bit, output bit]
    assert ((share - 0.5).abs() < 0.03).all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"pooled": torch.zeros(5)}, ValueError, r"pooled must have shape \[B, C\], got \[5\]"),
        ({"pooled": torch.zeros(0, 4), "labels": torch.zeros(0).long()}, ValueError, "at least one image"),
        (
            {"pooled": torch.zeros(5, 3)},
            ValueError,
            r"fuse_in_weight must have shape \[D, 2C\] = \[6, 6\], got \[6, 8\]",
        ),
        ({"fuse_in_weight": torch.zeros(6, 7)}, ValueError, r"fuse_in_weight must have shape \[D, 2C\] = \[6, 8\]"),
        ({"fuse_in_bias": torch.zeros(7)}, ValueError, r"fuse_in_bias must have shape \[D\] = \[6\], got \[7\]"),
        ({"fuse_out_weight": torch.zeros(6, 4)}, ValueError, r"fuse_out_weight must have shape \[C, D\] = \[4, 6\]"),
        (
            {"fuse_out_bias": torch.zeros(3).int()},
            TypeError,
            r"fuse_out_bias \[3\] must be floating point, got torch.int32",
        ),
        (
            {"classifier_weight": torch.zeros(3, 5)},
            ValueError,
            r"classifier_weight must have shape \[K, C\] = \[3, 4\]",
        ),
        ({"classifier_bias": None}, TypeError, r"classifier_bias must be a tensor \[K\], got NoneType"),
        ({"head": None}, TypeError, "head must be a PairHead, got NoneType"),
        ({"labels": torch.zeros(4).long()}, ValueError, r"labels must have shape \[B\] = \[5\], got \[4\]"),
        ({"labels": torch.zeros(5)}, TypeError, r"labels must be an int64 tensor \[B\], got torch.float32 \[5\]"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0])}, ValueError, r"labels \[5\] must lie in \[0, 3\), got .* 0 to 3"),
        ({"labels": torch.full((5,), -1)}, ValueError, "labels"),
        ({"activation": "gelu"}, ValueError, "activation must be one of 'relu', 'identity', got 'gelu'"),
        ({"dropout": 1.0}, ValueError, "0 <= dropout < 1, got 1.0"),
        ({"seed": 1.5}, TypeError, "seed must be an int or a 0-dim int64 tensor, got float"),
        ({"seed": 2**63}, ValueError, "seed must fit into 64 bits"),
        ({"seed": torch.zeros(2).long()}, ValueError, r"seed must have no dimension, got \[2\]"),
        ({"pairs": 0}, ValueError, "pairs must be at least 1, got 0"),
        ({"pairs": 26}, ValueError, r"pairs 26 exceeds the 5\^2 = 25 ordered pairs"),
        ({"pairs": 0.5}, TypeError, "pairs must be None, an int or an int64 tensor .* got float"),
        ({"pairs": True}, TypeError, "got bool"),
        (
            {"pairs": torch.zeros(3, 3).long()},
            ValueError,
            r"pairs must be a list \[P, 2\] of at least one pair, got \[3, 3\]",
        ),
        ({"pairs": torch.tensor([[0, 5]])}, ValueError, r"pairs \[1, 2\] must lie in \[0, 5\), got values from 0 to 5"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        pair_contrast(**changed(make_problem(5, 4, 6, 3, torch.float32), **change))
