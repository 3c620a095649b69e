"""Losses against their equations, written out image by image in float64, with gradients."""

from __future__ import annotations

import math

import pytest
import torch
from fpcn_kernels import PairHead
from torch import Tensor

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.tasks.losses import (
    ClassCenters,
    center_loss,
    class_weights,
    classification_loss,
    decoupled_divergence,
    distillation_loss,
    gated_contrast_loss,
    hardest_pairs,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape: int, seed: int = 0, requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def assert_same_with_gradients(loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(loss, expected, **EXACT)
    gradients, expected_gradients = (torch.autograd.grad(scalar, inputs) for scalar in (loss, expected))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert expected_gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected_gradient, **EXACT)


# --- cross-entropy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_classification_is_the_weighted_cross_entropy_of_shares(mixed: bool, weighted: bool) -> None:
    logits, labels = randn(6, 4), torch.tensor([0, 3, 2, 1, 1, 0])
    targets = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    targets = targets / targets.sum(1, keepdim=True) if mixed else torch.eye(4, dtype=torch.float64)[labels]
    weights = torch.tensor([0.5, 2.0, 1.25, 0.25], dtype=torch.float64) if weighted else torch.ones(4)
    total = 0.0
    for z, t in zip(logits, targets, strict=True):
        log_p = (z.exp() / z.exp().sum()).log()
        total = total - sum(weights[k] * t[k] * log_p[k] for k in range(4))
    options = {"targets": targets if mixed else None, "weights": weights if weighted else None}
    loss = classification_loss(logits, labels, **options)
    assert_same_with_gradients(loss, total / 6, [logits])
    parts = [
        classification_loss(logits[rows], labels[rows], **options | {"targets": targets[rows] if mixed else None})
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), loss, **EXACT)


def test_class_weights_are_one_on_average_and_those_of_their_definitions() -> None:
    counts = (10, 40, 1000)
    inverse = class_weights("inverse", counts)
    torch.testing.assert_close(inverse[0] / inverse, torch.tensor([1.0, 4.0, 100.0]))
    effective = class_weights("effective", counts)
    numbers = torch.tensor([(1 - 0.999**n) / (1 - 0.999) for n in counts])
    torch.testing.assert_close(effective[0] / effective, numbers / numbers[0])
    for weights in (inverse, effective):
        torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


# --- centre loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_center_loss_is_equation_11(reduction: str) -> None:
    pooled, centers, labels = randn(7, 5), randn(3, 5, seed=1, requires_grad=False), torch.tensor([0, 2, 1, 1, 0, 0, 2])
    expected = 0.5 * sum(((x - centers[y]) ** 2).sum() for x, y in zip(pooled, labels, strict=True))
    expected = expected / (7 * 5) if reduction == "mean" else expected
    assert_same_with_gradients(center_loss(pooled, labels, centers, reduction=reduction), expected, [pooled])


def test_mean_center_loss_means_the_same_for_any_batch_size_and_width() -> None:
    pooled, centers, labels = randn(4, 6), randn(2, 6, seed=1), torch.tensor([0, 1, 1, 0])
    loss = center_loss(pooled, labels, centers)
    torch.testing.assert_close(center_loss(pooled.repeat(3, 1), labels.repeat(3), centers), loss)
    torch.testing.assert_close(center_loss(pooled.repeat(1, 3), labels, centers.repeat(1, 3)), loss)


def test_center_loss_refuses_an_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        center_loss(randn(1, 2), torch.tensor([0]), randn(1, 2), reduction="none")


# --- class centres ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_centers_follow_equation_10(rate: float) -> None:
    centers = ClassCenters(4, 5).double()
    expected: dict[int, Tensor] = {}
    for step, labels in enumerate(([0, 1, 1, 0, 1], [1, 2, 2, 2, 1], [0, 0, 0, 2, 1])):
        pooled = randn(5, 5, seed=step)
        centers.update(pooled, torch.tensor(labels), rate)
        for label in set(labels):
            members = [x for x, y in zip(pooled.detach(), labels, strict=True) if y == label]
            start = expected.get(label, sum(members) / len(members))
            expected[label] = start + rate * sum(x - start for x in members) / len(members)
        for label, center in expected.items():
            torch.testing.assert_close(centers.centers[label], center, **EXACT)
        assert centers.seen.nonzero().flatten().tolist() == sorted(expected)
    assert not centers.centers[3].any()
    assert not centers.centers.requires_grad


def test_absent_classes_keep_their_bits_and_rate_one_is_the_batch_mean() -> None:
    centers = ClassCenters(2, 8)
    centers.update(randn(6, 8).float(), torch.tensor([0, 0, 0, 1, 1, 1]))
    before = centers.centers.clone()
    pooled = randn(4, 8, seed=1).detach().float()
    centers.update(pooled, torch.tensor([1, 1, 1, 1]))
    assert torch.equal(centers.centers[0], before[0])
    assert torch.equal(centers.centers[1], pooled.double().mean(0).float())


def test_centers_are_part_of_the_state() -> None:
    centers = ClassCenters(2, 3)
    centers.update(torch.ones(1, 3), torch.tensor([1]))
    restored = ClassCenters(2, 3)
    restored.load_state_dict(centers.state_dict())
    assert torch.equal(restored.centers, centers.centers)
    assert restored.seen.tolist() == [False, True]


# --- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_distillation_is_equations_13_and_14(alpha: float, temperature: float) -> None:
    student, teacher, labels = randn(6, 4), 3 * randn(6, 4, seed=1), torch.tensor([0, 3, 2, 1, 1, 0])
    total = 0.0
    for s, t, y in zip(student, teacher.detach(), labels, strict=True):
        p_teacher, p_student = ((z / temperature).exp() / (z / temperature).exp().sum() for z in (t, s))
        divergence = (p_teacher * (p_teacher / p_student).log()).sum()
        cross_entropy = -(s.exp() / s.exp().sum())[y].log()
        total = total + (1 - alpha) * cross_entropy + alpha * temperature**2 * divergence
    loss = distillation_loss(student, teacher, classification_loss(student, labels), temperature, alpha)
    assert_same_with_gradients(loss, total / 6, [student])
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_distillation_stays_finite_for_extreme_logits() -> None:
    student = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    class_loss = classification_loss(student, torch.tensor([0]))
    loss = distillation_loss(student, torch.tensor([[-1000.0, 1000.0]]), class_loss, 1.0, 0.5)
    loss.backward()
    assert loss.item() == 1000.0
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("temperature", "alpha", "field"),
    [(0.0, 0.5, "temperature"), (-1.0, 0.5, "temperature"), (2.0, 1.5, "alpha"), (2.0, -0.1, "alpha")],
)
def test_distillation_refuses_values_out_of_bounds(temperature: float, alpha: float, field: str) -> None:
    with pytest.raises(UserError) as caught:
        distillation_loss(randn(2, 3), randn(2, 3), torch.tensor(0.0), temperature, alpha)
    assert caught.value.field == f"distill.{field}"


def test_distillation_refuses_a_teacher_of_other_classes() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 4\]"):
        distillation_loss(randn(2, 3), randn(2, 4), torch.tensor(0.0), 2.0, 0.5)


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 1.0), (4.0, 8.0), (2.0, 0.0)])
def test_decoupled_divergence_is_its_equation(temperature: float, beta: float) -> None:
    student, teacher, labels = randn(6, 4), 3 * randn(6, 4, seed=1), torch.tensor([0, 3, 2, 1, 1, 0])
    total = 0.0
    for s, t, y in zip(student, teacher.detach(), labels.tolist(), strict=True):
        p_teacher, p_student = ((z / temperature).exp() / (z / temperature).exp().sum() for z in (t, s))
        rest_teacher, rest_student = 1 - p_teacher[y], 1 - p_student[y]
        total = total + p_teacher[y] * (p_teacher[y] / p_student[y]).log()
        total = total + rest_teacher * (rest_teacher / rest_student).log()
        for k in set(range(4)) - {y}:
            q_teacher, q_student = p_teacher[k] / rest_teacher, p_student[k] / rest_student
            total = total + beta * q_teacher * (q_teacher / q_student).log()
    loss = decoupled_divergence(student, teacher, labels, temperature, beta)
    assert_same_with_gradients(loss, total / 6, [student])
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


# --- hardest pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partners", [1, 2, 3])
def test_hardest_pairs_are_the_nearest_of_both_kinds(partners: int) -> None:
    pooled, labels = randn(12, 6), torch.tensor([0, 1, 2] * 4)
    pairs = hardest_pairs(pooled, labels, partners * 24)
    expected = []
    for same in (True, False):
        for i in range(12):
            others = [j for j in range(12) if j != i and (labels[i] == labels[j]).item() == same]
            others.sort(key=lambda j: ((pooled[i] - pooled[j]) ** 2).sum().item())
            expected += [[i, j] for j in others[:partners]]
    assert pairs.tolist() == expected
    assert pairs.dtype == torch.int64


def test_by_default_each_image_has_one_partner_of_each_kind() -> None:
    pooled, labels = randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.equal(hardest_pairs(pooled, labels), hardest_pairs(pooled, labels, 12))


def test_distances_survive_a_large_common_offset() -> None:
    pooled = torch.tensor([[0.0], [0.25], [0.75], [2.0]]) + 4096.0
    assert hardest_pairs(pooled, torch.zeros(4, dtype=torch.int64))[:4].tolist() == [[0, 1], [1, 0], [2, 1], [3, 2]]


def test_equal_distances_are_taken_in_order_of_index() -> None:
    pairs = hardest_pairs(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]))
    assert pairs.tolist() == [[0, 1], [1, 0], [2, 0], [3, 3], [0, 3], [1, 3], [2, 3], [3, 0]]


def test_an_image_pairs_with_itself_where_partners_are_missing() -> None:
    pooled, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
    same, other = hardest_pairs(pooled, labels, 12).chunk(2)
    assert same.tolist() == [[0, 1], [0, 0], [1, 0], [1, 1], [2, 2], [2, 2]]
    assert other.tolist() == [[0, 2], [0, 0], [1, 2], [1, 1], [2, 1], [2, 0]]
    assert hardest_pairs(pooled[:1], labels[:1]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("num_pairs", "advice"),
    [(20, "try 12 or 24"), (11, "try 12"), (30, "try 24 or 36"), (72, "try 60"), (61, "try 60")],
)
def test_a_number_of_pairs_that_does_not_fit_is_answered_with_those_that_do(num_pairs: int, advice: str) -> None:
    with pytest.raises(UserError, match=f"contrast.num_pairs {num_pairs}: .*multiples of 12, up to 60; {advice}$"):
        hardest_pairs(randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]), num_pairs)


# --- gated head -------------------------------------------------------------------------------------------------------

PAIRS = [(0, 1), (2, 0), (3, 3), (1, 4), (4, 2), (0, 1)]


def head() -> list[Tensor]:
    """Pooled vectors (5 images, 4 channels), then fuse_in, fuse_out (6 hidden units) and classifier (3 classes)."""
    shapes = (5, 4), (6, 8), (6,), (4, 6), (4,), (3, 4), (3,)
    return [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def gated_written_out(
    tensors: list[Tensor], labels: list[int], margin: float, relu: bool, keep_hidden: Tensor, keep_classifier: Tensor
) -> Tensor:
    """``keep_*``: multipliers of the hidden units of each pair, and of the classifier's input, four rows a pair."""
    pooled, w_in, b_in, w_out, b_out, w_cls, b_cls = tensors
    cross_entropy, ranking, rows = [], [], keep_classifier.split(len(PAIRS))
    for p, (a, b) in enumerate(PAIRS):
        h = w_in @ torch.cat([pooled[a], pooled[b]]) + b_in
        f = w_out @ (keep_hidden[p] * (h.clamp(min=0) if relu else h)) + b_out
        gate = {i: 1 / (1 + (-f * pooled[i]).exp()) for i in (a, b)}
        for image, other, self_row, other_row in ((a, b, rows[0][p], rows[2][p]), (b, a, rows[1][p], rows[3][p])):
            probabilities = []
            for by, row in ((image, self_row), (other, other_row)):
                z = w_cls @ (row * (pooled[image] * gate[by] + pooled[image])) + b_cls
                probabilities.append((z.exp() / z.exp().sum())[labels[image]])
                cross_entropy.append(-probabilities[-1].log())
            ranking.append((margin - (probabilities[0] - probabilities[1])).clamp(min=0))
    return sum(cross_entropy) / len(cross_entropy) + sum(ranking) / len(ranking)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("activation", "margin"), [("relu", 0.05), ("identity", 0.05), ("relu", 0.0)])
def test_gated_loss_is_the_released_codes(activation: str, margin: float, dropout: float) -> None:
    tensors, labels = head(), [0, 2, 1, 1, 0]
    loss = gated_contrast_loss(
        tensors[0],
        torch.tensor(labels),
        PairHead(*tensors[1:]),
        pairs=torch.tensor(PAIRS),
        margin=margin,
        activation=activation,
        dropout=dropout,
        seed=11,
    )
    generator = torch.Generator().manual_seed(11)
    keeps = [(torch.rand(*shape, generator=generator) >= dropout) / (1 - dropout) for shape in ((6, 6), (24, 4))]
    expected = gated_written_out(tensors, labels, margin, activation == "relu", *[keep.double() for keep in keeps])
    assert_same_with_gradients(loss, expected, tensors)


def test_gated_dropout_is_keyed_by_the_seed() -> None:
    pooled, *layers = head()
    losses = [
        gated_contrast_loss(
            pooled, torch.tensor([0, 2, 1, 1, 0]), PairHead(*layers), pairs=torch.tensor(PAIRS), dropout=0.5, seed=seed
        ).item()
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_without_a_difference_between_gates_the_ranking_loss_is_the_margin() -> None:
    pooled, *layers = head()
    labels, pairs, layers = torch.tensor([0] * 5), torch.tensor([[1, 1]]), PairHead(*layers)
    loss = {m: gated_contrast_loss(pooled, labels, layers, pairs=pairs, margin=m) for m in (0.0, 0.05)}
    assert math.isclose((loss[0.05] - loss[0.0]).item(), 0.05, rel_tol=1e-12)
