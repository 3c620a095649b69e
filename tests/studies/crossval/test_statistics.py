"""Scores against scikit-learn and torchmetrics; differences against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from fpcn_dist.studies.crossval.statistics import difference, scores

GENERATOR = np.random.default_rng(0)
LABELS = np.concatenate([np.arange(4), GENERATOR.integers(4, size=196)])


def _predictions(seeds: int, skill: float = 1.0) -> np.ndarray:
    logits = GENERATOR.normal(size=(seeds, len(LABELS), 4)) + skill * np.eye(4)[LABELS]
    return (np.exp(logits) / np.exp(logits).sum(2, keepdims=True)).astype(np.float32)


def test_scores_are_those_of_the_libraries() -> None:
    (table,) = _predictions(1)
    found = scores(table, LABELS)
    assert found.accuracy == pytest.approx(accuracy_score(LABELS, table.argmax(1)))
    assert found.balanced == pytest.approx(balanced_accuracy_score(LABELS, table.argmax(1)))
    exact = table.astype(np.float64) / table.sum(1, keepdims=True, dtype=np.float64)
    assert found.log_loss == pytest.approx(log_loss(LABELS, exact), rel=1e-5)
    ece = multiclass_calibration_error(torch.from_numpy(table), torch.from_numpy(LABELS), num_classes=4, n_bins=15)
    assert found.ece == pytest.approx(float(ece), abs=1e-6)


def test_a_wrong_certainty_costs_much_but_not_all() -> None:
    table = np.eye(4, dtype=np.float32)[(LABELS + 1) % 4]
    assert scores(table, LABELS).log_loss == pytest.approx(-np.log(1e-12))


def test_equal_predictions_do_not_differ() -> None:
    table = _predictions(2)
    found = difference(table, table, LABELS, np.arange(len(LABELS)))
    assert found == (0.0, 0.0, 0.0, 1.0)


def test_a_difference_is_that_of_the_accuracies_and_mcnemar_s_is_exact() -> None:
    worse = np.eye(4, dtype=np.float32)[np.where(np.arange(len(LABELS)) < 20, (LABELS + 1) % 4, LABELS)][None]
    better = np.eye(4, dtype=np.float32)[np.where(np.arange(len(LABELS)) < 5, (LABELS + 1) % 4, LABELS)][None]
    found = difference(better, worse, LABELS, np.arange(len(LABELS)))
    assert found.mean == pytest.approx(15 / len(LABELS))
    assert 0 < found.low < found.mean < found.high
    assert found.p == pytest.approx(2 * binom.cdf(0, 15, 0.5))


def test_each_seed_counts_and_their_numbers_may_differ() -> None:
    first, second = _predictions(3, 2.0), _predictions(1, 0.5)
    found = difference(first, second, LABELS, np.arange(len(LABELS)))
    means = [np.mean([scores(table, LABELS).accuracy for table in rows]) for rows in (first, second)]
    assert found.mean == pytest.approx(means[0] - means[1])


def test_near_duplicates_count_once() -> None:
    first, second, groups = _predictions(1, 2.0), _predictions(1, 0.5), np.arange(len(LABELS))
    alone = difference(first, second, LABELS, groups)
    twice = [np.concatenate([table, table], axis=1) for table in (first, second)]
    together = difference(*twice, np.tile(LABELS, 2), np.tile(groups, 2))
    apart = difference(*twice, np.tile(LABELS, 2), np.arange(2 * len(LABELS)))
    assert together[:3] == pytest.approx(alone[:3])
    assert apart.high - apart.low < 0.85 * (alone.high - alone.low)
