"""The kernels of pair_contrast against float64: under Triton's interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from fpcn_kernels import _launch, pair_contrast, reference
from fpcn_kernels.pairs import assemble, backend_torch, backend_triton
from fpcn_kernels.pairs.arguments import clamped
from fpcn_kernels.pairs.problem import Side, SideGradients
from fpcn_kernels.pairs.random import PairDropout, RandomPairs

from tests.helpers.pair_problems import LISTED, PARAMETERS, gradients_of, make_problem, mapped, operands
from tests.helpers.properties import given, settings, st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _narrow(sizes, dtype=torch.float32, seed=0):
    """A problem of ``dtype`` with logits of order one, as a trained network has them."""
    problem = mapped(make_problem(*sizes, seed=seed), lambda name, values: (values * 0.4).to(DEVICE, dtype))
    return {**problem, "labels": problem["labels"].to(DEVICE)}


def _assert_matches(problem, tolerance=2e-6, expected_backend="torch", **options):
    """Loss and gradients of the kernels against float64, relative to the largest entry of each."""
    wide = mapped(problem, lambda name, values: values.double())
    got = pair_contrast(**problem, **options, backend="triton")
    expected = pair_contrast(**wide, **options, backend=expected_backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)
    got, expected = gradients_of(got, problem), gradients_of(expected, wide)
    for name, value in expected.items():
        rounding = torch.finfo(got[name].dtype).eps
        bound = (tolerance + (0 if rounding < tolerance else rounding)) * float(value.abs().max())
        torch.testing.assert_close(got[name].double(), value, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def dense(monkeypatch):
    """Random pairs are never listed: the kernels choose them."""
    monkeypatch.setattr(sys.modules["fpcn_kernels.pairs.operator"], "is_cheaper_listed", lambda *sizes: False)


# K of both kinds of kernels; D beside and beyond a tile.
@pytest.mark.parametrize("sizes", [(1, 33, 6, 3), (2, 33, 5, 2), (9, 7, 12, 3), (4, 6, 3, 17), (5, 6, 130, 8)])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("pairs", ["all", "random"])
def test_matches_reference(dense, sizes, pairs, activation):
    count = None if pairs == "all" else sizes[0] ** 2 // 2 + 1
    dropout = 0.0 if activation == "relu" else 0.4
    options = {"pairs": count, "activation": activation, "dropout": dropout, "seed": -5}
    _assert_matches(_narrow(sizes), expected_backend="reference", **options)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(21, 5, 7, 2), (21, 33, 10, 17)])
def test_odd_batch(sizes):
    _assert_matches(_narrow(sizes))


def test_many_classes():
    """More classes than a tile of any kernel has."""
    _assert_matches(_narrow((7, 9, 70, 150)), dropout=0.3)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4, "seed": 3}, {"activation": "identity"}, {"pairs": 50}])
@pytest.mark.parametrize("sizes", [(20, 7, 33, 2), (9, 7, 70, 9), (9, 6, 70, 13), (2, 5, 600, 3)])
def test_products_in_float16(dense, sizes, options):
    """Up to eight columns of classes, more, and more units than a program of the former takes.

    A float16 has 11 bits; what is wrong in kind is wrong by more than the bounds. Those of the first layer are wide, as
    in problems as small as these a single unit near zero, on the other side of the relu, makes a percent of a sum.
    """
    problem = _narrow(sizes)
    pairs = {"pairs": min(options["pairs"], sizes[0] ** 2)} if "pairs" in options else {}
    wide = mapped(problem, lambda name, values: values.double())
    got = pair_contrast(**problem, **{**options, **pairs}, backend="triton", matmul="high")
    expected = pair_contrast(**wide, **{**options, **pairs}, backend="torch")
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=0)
    got, expected = gradients_of(got, problem), gradients_of(expected, wide)
    for name, value in expected.items():
        error = (got[name].double() - value).norm() / value.norm()
        assert 1e-7 < error < (3e-2 if name in ("pooled", "fuse_in_weight", "fuse_in_bias") else 2e-3), (
            name,
            float(error),
        )


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_float16_neither_overflows_nor_vanishes(size):
    """Powers of two bring operands of any size into its range."""
    parameters = {"fuse_in_weight": size, "fuse_in_bias": size, "fuse_out_weight": 1 / size}
    problem = mapped(_narrow((5, 6, 20, 3)), lambda name, values: values * parameters.get(name, 1.0))
    exact, rounded = (pair_contrast(**problem, backend="triton", matmul=matmul) for matmul in ("highest", "high"))
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "rounds",
    [False, pytest.param("legacy", id="set_float32_matmul_precision"), pytest.param("new", id="fp32_precision")],
)
def test_products_are_rounded_where_pytorch_may_round_its_own(rounds):
    problem, matmul = _narrow((5, 6, 20, 3)), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if rounds == "legacy":
            torch.set_float32_matmul_precision("high")
        elif rounds == "new":
            matmul.fp32_precision = "tf32"
        got = pair_contrast(**problem, backend="triton")
    finally:
        matmul.fp32_precision = before
    assert torch.equal(got, pair_contrast(**problem, backend="triton", matmul="high" if rounds else "highest"))


def test_products_are_rounded_under_autocast():
    problem = _narrow((5, 6, 20, 3))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = pair_contrast(**problem, backend="triton")
    assert torch.equal(got, pair_contrast(**problem, backend="triton", matmul="high"))


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_labels_out_of_bounds(monkeypatch, label):
    """On the CPU an error; on a device, which nobody waits for, what makes loss and gradients NaN."""
    problem = _narrow((4, 5, 6, 3))
    problem["labels"][1] = label
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"labels \[4\] must lie in \[0, 3\), got values from"):
            pair_contrast(**problem, backend="triton")
        operator = sys.modules["fpcn_kernels.pairs.operator"]
        monkeypatch.setattr(operator, "in_bounds", lambda name, index, end: clamped(index, end))
    for backend in ("triton", "torch"):
        loss = pair_contrast(**problem, backend=backend)
        assert loss.isnan() and all(gradient.isnan().any() for gradient in gradients_of(loss, problem).values())


@pytest.mark.parametrize("classes", [3, 17])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_accumulates_in_float32(dtype, classes):
    _assert_matches(_narrow((6, 33, 12, classes), dtype))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [3, 17])
def test_blocks_and_pieces_do_not_matter(dense, monkeypatch, classes):
    """Also that images and hidden units keep their global indices in every piece."""
    options = {"pairs": 40, "dropout": 0.3, "seed": 9}
    for scores, block in ((1, 2**25), (2**25, 700), (4 * classes * 9 * 2, 2000)):
        monkeypatch.setattr(backend_triton, "_SCORES_BYTES", scores)
        monkeypatch.setitem(assemble._BLOCK_BYTES, "cpu", block)
        monkeypatch.setitem(assemble._BLOCK_BYTES, "accelerator", block)
        _assert_matches(_narrow((9, 6, 5, classes)), **options)


@pytest.mark.parametrize("classes", [3, 17])
def test_deterministic(classes):
    problem = _narrow((8, 5, 20, classes))
    losses = [pair_contrast(**problem, dropout=0.5, seed=3, backend="triton") for _ in range(2)]
    assert torch.equal(*losses)
    first, second = (gradients_of(loss, problem) for loss in losses)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(pair_contrast(**problem, dropout=0.5, seed=3, backend="triton"), losses[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")  # the interpreter's
@pytest.mark.parametrize("classes", [3, 17])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["pooled", *PARAMETERS])
def test_non_finite_is_never_silent(dense, name, value, classes):
    problem = _narrow((3, 4, 5, classes))
    with torch.no_grad():
        operands(problem)[name].view(-1)[-1] = value
    loss = pair_contrast(**problem, pairs=4, backend="triton")
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients_of(loss, problem).values())


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")  # the interpreter's
def test_non_finite_in_the_hidden_layer_reaches_the_loss():
    """The kernels' own part of it: a relu by comparison would turn NaN into zero."""
    for classes in (3, 17):
        side = _side(4, 5, 6, classes, relu=True)
        side.others_JD[2, 3] = torch.nan
        assert backend_triton.side_loss(side).isnan()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("classes", [3, 17])
def test_operator_contract(classes):
    problem, seed = _narrow((3, 5, 6, classes)), torch.tensor(1, device=DEVICE)
    positional = (
        *operands(problem).values(),
        problem["labels"],
        seed,
        None,
        None,
        None,
        True,
        0.2,
        "auto",
        None,
        "triton",
        True,
    )
    torch.library.opcheck(torch.ops.fpcn.pair_contrast.default, positional)

    def run():
        return pair_contrast(**problem, seed=seed, dropout=0.2, backend="triton") * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    first, second = run(), compiled()
    assert torch.equal(first, second)
    first, second = gradients_of(first, problem), gradients_of(second, problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_listed_pairs_run_in_pytorch():
    problem = _narrow((4, 5, 6, 3))
    expected = pair_contrast(**problem, pairs=LISTED.to(DEVICE), backend="torch")
    assert torch.equal(pair_contrast(**problem, pairs=LISTED.to(DEVICE), backend="triton"), expected)


def _side(own, others, width, classes, relu, own_first=0, others_first=0, images=20, gradients=True, rounded=False):
    """A side between some images and some others of a batch, with dropout and random pairs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    everyone = draw(images, 2 * width)
    tensors = draw(images, classes - 1, width)[:own], draw(images, classes - 1)[:own]
    rows = everyone[own_first : own_first + own, :width], everyone[others_first : others_first + others, width:]
    seed = torch.tensor(7, device=DEVICE)
    return Side(
        own_is_a=False,
        own_ID=rows[0],
        others_JD=rows[1],
        own_first=own_first,
        others_first=others_first,
        G_ILD=tensors[0],
        g_IL=tensors[1],
        labels_I=torch.arange(own, device=DEVICE) % classes,
        relu=relu,
        dropout=PairDropout(0.25, seed, images, width, torch.float32),
        chosen=RandomPairs(images**2 // 3, seed, images),
        scale=torch.tensor(0.5, device=DEVICE),
        rounded=rounded,
        gradients=SideGradients(*(torch.zeros_like(t) for t in (*rows, *tensors))) if gradients else None,
    )


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.sampled_from([2, 9]), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_pairs_with_two_disjoint_batches_add_up(classes, own, first, second, relu):
    """What a ring of ranks relies on; and each part is what PyTorch finds for it."""
    sizes = own, 6, classes, relu, 3
    whole = _side(sizes[0], first + second, *sizes[1:], 8)
    parts = _side(sizes[0], first, *sizes[1:], 8), _side(sizes[0], second, *sizes[1:], 8 + first)
    losses = [backend_triton.side_loss(side) for side in (whole, *parts)]
    torch.testing.assert_close(losses[0], losses[1] + losses[2], rtol=1e-6, atol=1e-6)
    own_grad, others_grad, *layers_grad = whole.gradients
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(others_grad, torch.cat([part.gradients.others_JD for part in parts]), **close)
    for got, *added in zip(
        (own_grad, *layers_grad),
        *((p.gradients.own_ID, p.gradients.G_ILD, p.gradients.g_IL) for p in parts),
        strict=True,
    ):
        torch.testing.assert_close(got, sum(added), **close)
    expected = _side(sizes[0], first + second, *sizes[1:], 8)
    torch.testing.assert_close(backend_torch.side_loss(expected), losses[0], rtol=1e-6, atol=1e-6)
    for got, value in zip(whole.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(got, value, **close)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.permutations(range(4)), st.sampled_from([2, 9]), st.integers(0, 2**31))
def test_permuting_the_images_permutes_their_gradients(order, classes, seed):
    problem, order = _narrow((4, 5, 6, classes), seed=seed), list(order)
    loss = pair_contrast(**problem, backend="triton")
    expected = gradients_of(loss, problem)
    pooled = problem["pooled"].detach()[order].requires_grad_()
    permuted = {**problem, "pooled": pooled, "labels": problem["labels"][order]}
    permuted_loss = pair_contrast(**permuted, backend="triton")
    torch.testing.assert_close(permuted_loss, loss)
    for name, value in gradients_of(permuted_loss, permuted).items():
        wanted = expected[name][order] if name == "pooled" else expected[name]
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "sizes, dtype, message",
    [
        ((3, 4, 5, 2), torch.float64, "they accumulate in float32, and an argument is float64"),
        ((3, 4, 5, 1025), torch.float32, "at most 1024 classes and 2048 hidden units, got K = 1025 and D = 5"),
        ((3, 4, 2049, 2), torch.float32, "got K = 2 and D = 2049"),
    ],
)
def test_what_the_kernels_cannot(sizes, dtype, message, caplog):
    problem = _narrow(sizes, dtype)
    with pytest.raises(RuntimeError, match=f"backend 'triton': the kernels cannot run, as .*{message}"):
        pair_contrast(**problem, backend="triton")
    _launch._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fpcn_kernels"):
        assert torch.equal(pair_contrast(**problem), pair_contrast(**problem, backend="torch"))
        assert pair_contrast(**problem).isfinite()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("PyTorch runs instead of the Triton kernels, as")


def test_dropout_words_are_the_reference_s():
    """The words that the kernels hash are those that the reference hashes."""
    dropout = PairDropout(0.25, torch.tensor(11), 40, 64, torch.float32)
    words = [word.long() & 0xFFFFFFFF for word in dropout.words()]
    for a, b, unit in ((0, 0, 0), (3, 17, 5), (39, 2, 63)):
        pair = reference.mix(int(words[0][a]) ^ int(words[1][b]))
        assert reference.mix(pair ^ int(words[2][unit])) == reference.dropout_word(11, a, b, unit)
