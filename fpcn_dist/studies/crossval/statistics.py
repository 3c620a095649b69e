"""How well predictions fit, and whether one way is better than another on the same photographs.

Legend: N photographs, S seeds, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float32]
Labels = NDArray[np.int64]
RESAMPLES = 2000
_BINS = 15


class Scores(NamedTuple):
    """Of one seed, over all test folds.

    Attributes:
        accuracy: share of photographs whose most probable class is the true one.
        balanced: mean over the classes of the share of their photographs that is found.
        log_loss: mean negative logarithm of the true class's probability.
        ece: expected calibration error over 15 bins of equal width (Guo et al., ICML 2017).
    """

    accuracy: float
    balanced: float
    log_loss: float
    ece: float


class Difference(NamedTuple):
    """Of the accuracy of one row from that of another, paired by photograph and averaged over seeds.

    Attributes:
        mean: the first row's accuracy less the second's.
        low, high: 95 % bootstrap interval over groups of near-duplicates.
        p: of McNemar's exact test between the two rows' mean probabilities over their seeds.
    """

    mean: float
    low: float
    high: float
    p: float


def scores(probabilities_NK: Probabilities, labels: Labels) -> Scores:
    """Score the predictions of one seed."""
    right = probabilities_NK.argmax(1) == labels
    confidence = probabilities_NK.max(1)
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, right - confidence, minlength=_BINS)
    true = np.maximum(probabilities_NK[np.arange(len(labels)), labels].astype(np.float64), 1e-12)
    return Scores(
        float(right.mean()),
        float(np.mean([right[labels == label].mean() for label in np.unique(labels)])),
        float(-np.log(true).mean()),
        float(np.abs(gaps).sum() / len(labels)),
    )


def difference(first_SNK: Probabilities, second_SNK: Probabilities, labels: Labels, groups: Labels) -> Difference:
    """Compare two rows on the same photographs; each may have its own number of seeds.

    Args:
        first_SNK, second_SNK: probabilities of the two.
        labels: [N].
        groups: [N] near-duplicates, which the bootstrap draws together.
    """
    from scipy.stats import binomtest

    right = [(part.argmax(2) == labels).mean(0) for part in (first_SNK, second_SNK)]
    _, group_N = np.unique(groups, return_inverse=True)
    counts = np.bincount(group_N)
    gained = np.bincount(group_N, right[0] - right[1])
    drawn = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    low, high = np.percentile(gained[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    found = [part.mean(0).argmax(1) == labels for part in (first_SNK, second_SNK)]
    only_first, only_second = int((found[0] & ~found[1]).sum()), int((found[1] & ~found[0]).sum())
    discordant = only_first + only_second
    p = binomtest(only_first, discordant).pvalue if discordant else 1.0
    return Difference(float(right[0].mean() - right[1].mean()), float(low), float(high), float(p))
