"""The statistics of a probe: its classifiers, its intervals, and what it says about a trained model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from fpcn_dist.runs.evaluation import AREAS, AreaScore, ClassScore, Evaluation
from fpcn_dist.runs.probe import (
    LOGISTIC,
    NEAREST,
    Probe,
    Score,
    bootstrap_interval,
    require_folds,
    score_folds,
    score_split,
)
from fpcn_dist.runtime.errors import UserError


def clouds(counts: list[int], spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around the corners of a simplex, so many of each class, in random order."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(counts)), counts))
    features = np.eye(len(counts))[labels] + spread * random.standard_normal((len(labels), len(counts)))
    return features.astype(np.float32), labels


def test_classes_that_are_apart_are_told_apart_and_labels_without_meaning_are_not():
    features, labels = clouds([40, 30, 20], spread=0.05)
    train = np.arange(90) < 60
    for score in score_split(features, labels, train, 3, seed=0):
        assert (score.accuracy, score.low, score.high, score.balanced_accuracy) == (1.0, 1.0, 1.0, 1.0)
    meaningless = np.random.default_rng(1).permutation(labels)
    scores = score_split(features, meaningless, train, 3, seed=0)
    assert [score.classifier for score in scores] == [LOGISTIC, NEAREST]
    assert all(score.low <= score.accuracy <= score.high < 0.8 for score in scores)


def test_the_images_scored_play_no_part_in_the_fit():
    """Their labels are all wrong here: whoever had seen them would find some."""
    features, labels = clouds([40, 40], spread=0.05)
    train = np.arange(80) < 50
    wrong = np.where(train, labels, 1 - labels)
    assert all(score.accuracy == 0 for score in score_split(features, wrong, train, 2, seed=0))


def test_scores_are_those_of_scikit_learn():
    features, labels = clouds([30, 20, 5], spread=0.6)
    features = np.concatenate([features, np.eye(3, dtype=np.float32)])  # classes are found in these rows by design
    labels = np.concatenate([labels, np.arange(3)])
    train = np.arange(58) < 40
    from sklearn.neighbors import NearestCentroid
    from sklearn.preprocessing import normalize

    predicted = NearestCentroid().fit(normalize(features[train]), labels[train]).predict(normalize(features[~train]))
    nearest = score_split(features, labels, train, 3, seed=0)[1]
    assert 0 < nearest.accuracy < 1
    assert nearest.accuracy == pytest.approx(accuracy_score(labels[~train], predicted))
    assert nearest.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels[~train], predicted))


def test_folds_classify_every_image_once_by_what_the_others_teach():
    features, labels = clouds([12, 9, 6], spread=0.05)
    scores = score_folds(features, labels, 3, 3, seed=0)
    assert all(score.accuracy == 1 for score in scores) and scores[0].C is not None and scores[1].C is None
    # Each point is alone in its class at its place: only those that were fitted could be found.
    far = np.eye(27, dtype=np.float32)
    assert score_folds(far, np.arange(27) % 9, 3, 9, seed=0)[1].accuracy < 0.5


def test_a_class_with_one_training_image_is_fitted():
    features, labels = clouds([20, 20], spread=0.05)
    features, labels = np.concatenate([features, [[-5, -5]] * 2]).astype(np.float32), np.concatenate([labels, [2, 2]])
    train = (np.arange(42) < 30) | (np.arange(42) == 40)
    logistic, nearest = score_split(features, labels, train, 3, seed=0)
    assert logistic.accuracy >= 10 / 11 and nearest.accuracy == 1


def test_folds_need_an_image_of_each_class():
    labels = np.array([0, 0, 0, 1, 1, 2])
    with pytest.raises(UserError, match=r"--folds 2: class 'c' has only 1 image\(s\), .*; add images of it"):
        require_folds(2, labels, "abc")
    with pytest.raises(UserError, match=r"--folds 3: class 'b' has only 2 image\(s\), .*; take at most 2"):
        require_folds(3, labels[:5], "ab")
    require_folds(2, labels[:5], "ab")


def test_the_bootstrap_interval_is_that_of_drawing_images():
    correct = np.arange(200) < 150
    low, high = bootstrap_interval(correct, seed=3)
    random = np.random.default_rng(4)
    drawn = [correct[random.integers(200, size=200)].mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.006)
    assert bootstrap_interval(correct, seed=3) == (low, high)


PROBE = Probe(
    "mobilenet_v2",
    True,
    "0" * 64,
    {"crop": 224},
    "test",
    0,
    100,
    50,
    (Score(LOGISTIC, 0.7, 0.6, 0.8, 0.65, 0.01), Score(NEAREST, 0.6, 0.5, 0.7, 0.55)),
)


def evaluation(accuracy: float, split: str = "test", images: int = 50) -> Evaluation:
    per_class = tuple(ClassScore(name, None, None, None, 25) for name in "ab")
    areas = tuple(AreaScore(area, 0, None) for area in AREAS)
    return Evaluation(split, "best", 1, images, 0.5, accuracy, per_class, ((20, 5), (10, 15)), areas)


@pytest.mark.parametrize(
    ("scored", "words"),
    [
        (evaluation(0.7), "It does not beat the probe"),
        (evaluation(0.8), "It is above the probe, but within its interval"),
        (evaluation(0.82), "It beats the probe"),
        (evaluation(0.82, split="val"), "Not compared with the probe"),
        (evaluation(0.82, images=40), "Not compared with the probe"),
        (None, "Not compared with the probe"),
    ],
)
def test_a_model_that_does_not_beat_the_probe_is_said_not_to(scored, words):
    assert PROBE.verdict(scored).startswith(words)
    assert "70.0 % (60.0 to 80.0 %) of 50 test images" in PROBE.verdict(scored)


def test_a_probe_comes_back_from_its_folder(tmp_path):
    assert Probe.load(tmp_path) is None
    PROBE.save(tmp_path)
    assert Probe.load(tmp_path) == PROBE
    (tmp_path / "probe.json").write_text('{"scores": []}')
    with pytest.raises(UserError, match=r"probe.json: is not a probe"):
        Probe.load(tmp_path)


def test_balanced_accuracy_is_the_mean_over_the_classes_that_have_images():
    assert evaluation(0.7).balanced_accuracy == pytest.approx((0.8 + 0.6) / 2)
    alone = dataclasses.replace(evaluation(0.7), confusion=((20, 5), (0, 0)))
    assert alone.balanced_accuracy == pytest.approx(0.8)
    assert '"balanced_accuracy": 0.8' in alone.to_json() and Evaluation.from_json(alone.to_json()) == alone
