"""The bar to beat: how well simple classifiers do on the frozen features of a backbone as it was before any training.

Kornblith et al., "Do better ImageNet models transfer better?" (CVPR 2019), fit logistic regression to such features.

Shape legend: N images, C channels of a feature vector, K classes.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpcn_dist.runs.evaluation import Evaluation, balanced_accuracy
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import read_record, write_text

PROBE_FILE = "probe.json"
LOGISTIC, NEAREST = "logistic regression", "nearest class mean"
_CS = tuple(10.0**exponent for exponent in range(-4, 1))
_INNER_FOLDS = 5
_RESAMPLES = 2000
Features = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """What one classifier reaches.

    Attributes:
        classifier: its name.
        accuracy: share of images whose class it finds.
        low, high: 95 % bootstrap interval of the accuracy, over the images.
        balanced_accuracy: mean over the classes of the share of their images that it finds.
        C: inverse strength of its L2 penalty, where it has one; of several folds the median.
    """

    classifier: str
    accuracy: float
    low: float
    high: float
    balanced_accuracy: float
    C: float | None = None

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f} %)"


@dataclass(frozen=True)
class Probe:
    """Scores on the frozen features of a backbone; probe.json in a run folder.

    Attributes:
        backbone, pretrained: the network and its weights, as the recipe names them.
        manifest: hash of the images and their splits.
        pixels: what decides the pixels of a view, by the names of recipe fields; the central view was shown.
        split: the images that were classified: "val" or "test"; or "all", each by the classifiers of the other folds.
        folds: folds of the cross-validation; 0: one fit on the training images.
        training, images: number of images fitted (in one fit) and classified.
        scores: of :data:`LOGISTIC` and :data:`NEAREST`.
    """

    backbone: str
    pretrained: bool | str
    manifest: str
    pixels: dict[str, Any]
    split: str
    folds: int
    training: int
    images: int
    scores: tuple[Score, ...]

    @property
    def size(self) -> int:
        """Side in pixels of the central view."""
        return self.pixels["crop"]

    @property
    def bar(self) -> Score:
        """The score of the logistic regression."""
        return next(score for score in self.scores if score.classifier == LOGISTIC)

    def verdict(self, evaluation: Evaluation | None) -> str:
        """A sentence on a trained model beside the probe of its own backbone."""
        images = f"{self.images} {self.split} images"
        bar = f"logistic regression on the frozen features of its backbone: {self.bar} of {images}"
        if evaluation is None or (evaluation.split, evaluation.images) != (self.split, self.images):
            return f"Not compared with the probe, {bar}."
        if evaluation.accuracy <= self.bar.accuracy:
            return f"It does not beat the probe, {bar}."
        if evaluation.accuracy <= self.bar.high:
            return f"It is above the probe, but within its interval, {bar}."
        return f"It beats the probe, {bar}."

    def save(self, folder: Path) -> None:
        """Write ``folder``/probe.json."""
        write_text(folder / PROBE_FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Probe | None:
        """Read ``folder``/probe.json; ``None`` where there is none.

        Raises:
            UserError: the file is damaged.
        """
        return read_record(Path(folder) / PROBE_FILE, cls.from_json, "remove it")

    @classmethod
    def from_json(cls, text: str) -> Probe:
        """Inverse of what :meth:`save` writes.

        Raises:
            ValueError: not JSON, or not a probe.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            values["scores"] = tuple(Score(**score) for score in values["scores"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"is not a probe ({error})") from error


def require_scikit_learn() -> None:
    """Raise a UserError unless scikit-learn is installed; for before the features are computed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("package", error.name, "is not installed", "pip install scikit-learn") from None


def score_split(
    features: Features, labels: Labels, train: NDArray[np.bool_], classes: int, seed: int
) -> tuple[Score, ...]:
    """Fit on some images, classify the others.

    Args:
        features: [N, C].
        labels: [N].
        train: [N] which images are fitted.
        classes: K.
        seed: of the folds that choose C, and of the bootstrap.
    """
    predictions, C = _predict(features[train], labels[train], features[~train], seed)
    return _scores(labels[~train], predictions, classes, C, seed)


def require_folds(folds: int, labels: Labels, classes: Sequence[str]) -> None:
    """Raise a UserError unless each fold can have an image of each class."""
    counts = np.bincount(labels, minlength=len(classes))
    if (least := int(counts.min())) < folds:
        reason = f"class {classes[int(counts.argmin())]!r} has only {least} image(s), and each fold needs one"
        hint = f"take at most {least}" if least > 1 else "add images of it, or leave --folds out"
        raise UserError("--folds", folds, reason, hint)


def score_folds(features: Features, labels: Labels, folds: int, classes: int, seed: int) -> tuple[Score, ...]:
    """Classify every image with classifiers fitted on the other folds, which hold each class in equal shares."""
    from sklearn.model_selection import StratifiedKFold

    predictions = {name: np.empty_like(labels) for name in (LOGISTIC, NEAREST)}
    chosen = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, labels):
        found, C = _predict(features[train], labels[train], features[test], seed)
        chosen.append(C)
        for name, predicted in found.items():
            predictions[name][test] = predicted
    return _scores(labels, predictions, classes, float(np.median(chosen)), seed)


def fit_logistic(features: Features, labels: Labels, seed: int) -> Any:
    """scikit-learn's logistic regression of ``labels`` [N] on standardised ``features`` [N, C], with the C of
    :data:`_CS` that does best in a cross-validation on them, which ``seed`` shuffles."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    fewest = int(np.bincount(labels)[np.unique(labels)].min())
    inner = StratifiedKFold(min(_INNER_FOLDS, max(2, fewest)), shuffle=True, random_state=seed)
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
    search = GridSearchCV(logistic, {"logisticregression__C": _CS}, cv=inner)
    # Products this small take threads twelve times as long, which wait for one another.
    with threadpool_limits(1), warnings.catch_warnings():
        # Weak penalties lose the choice long before they converge; a class with one image is in one fold alone.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return search.fit(features, labels)


def _predict(features: Features, labels: Labels, unknown: Features, seed: int) -> tuple[dict[str, Labels], float]:
    """What each classifier makes of ``unknown``, and the C that was chosen by cross-validation on ``features``."""
    fitted = fit_logistic(features, labels, seed)
    found = {LOGISTIC: fitted.predict(unknown), NEAREST: _nearest_class_mean(features, labels, unknown)}
    return found, float(fitted.best_params_["logisticregression__C"])


def _nearest_class_mean(features: Features, labels: Labels, unknown: Features) -> Labels:
    """The class whose mean is nearest, all vectors scaled to length 1 before."""
    features, unknown = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (features, unknown))
    classes = np.unique(labels)
    means = np.stack([features[labels == label].mean(axis=0) for label in classes])
    # ||x - m||^2 = ||x||^2 - 2 <x, m> + ||m||^2, and ||x|| is the same for all means.
    return classes[((means**2).sum(axis=1) - 2 * unknown @ means.T).argmin(axis=1)]


def _scores(labels: Labels, predictions: dict[str, Labels], classes: int, C: float, seed: int) -> tuple[Score, ...]:
    return tuple(
        Score(
            name,
            float((predicted == labels).mean()),
            *bootstrap_interval(predicted == labels, seed),
            balanced_accuracy(_confusion(labels, predicted, classes)),
            C if name == LOGISTIC else None,
        )
        for name, predicted in predictions.items()
    )


def _confusion(labels: Labels, predicted: Labels, classes: int) -> list[list[int]]:
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes).tolist()


def bootstrap_interval(correct: NDArray[np.bool_], seed: int) -> tuple[float, float]:
    """95 % percentile interval of the share of ``correct`` [N], from :data:`_RESAMPLES` samples with replacement."""
    # How often N draws with replacement meet a correct one is binomial: the draws themselves are not needed.
    hits = np.random.default_rng(seed).binomial(len(correct), correct.mean(), _RESAMPLES)
    low, high = np.percentile(hits / len(correct), [2.5, 97.5])
    return float(low), float(high)
