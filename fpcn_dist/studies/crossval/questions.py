"""Which trainings are compared, and which comparisons answer which question (docs/study.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from fpcn_dist.runtime.errors import UserError, nearest

Depth = Literal["probe", "head", "stage"]
"""What learns: logistic regression on frozen features, a head on them, or the head and the backbone's last stage."""

RATES: dict[str, tuple[float, ...]] = {"probe": (0.0,), "head": (3e-4, 1e-3, 3e-3), "stage": (3e-4, 1e-3, 3e-3)}
"""Learning rates of AdamW for the head, of which each row takes the best on the validation photographs."""
BACKBONE_RATE = 0.1
"""Learning rate of the last stage, as a share of the head's."""
PROBE, LINEAR, PLAIN, PAIRS = "logistic regression", "linear head", "plain, last stage", "FPCN, all pairs"
OWN, PLAIN_VECTOR, CLASS_MEANS, TRAINING_IMAGES = "as trained", "plain vector", "class means", "training images"
READINGS = (OWN, PLAIN_VECTOR, CLASS_MEANS, TRAINING_IMAGES)
_STAGE = ", last stage"


class Row(NamedTuple):
    """A way to train.

    Attributes:
        name: in tables.
        depth: what learns.
        changes: to the study's recipe, by dotted field.
        self_share: share of the loss that classifies each image as its pair with itself; the rest is the recipe's.
        readings: ways to classify a photograph with the trained network that the table shows.
        seeds: trainings on each fold; ``None``: as many as the command asks for.
    """

    name: str
    depth: Depth
    changes: dict[str, Any]
    self_share: float = 0.0
    readings: tuple[str, ...] = (OWN,)
    seeds: int | None = None


class Question(NamedTuple):
    """Rows that are compared with one another.

    Attributes:
        key: what ``--only`` calls it.
        title: the question.
        rows: in the order of its table.
        reference: of each depth, the name of the row that the others are compared with.
    """

    key: str
    title: str
    rows: tuple[Row, ...]
    reference: dict[str, str]


def _fpcn(name: str, depth: Depth = "head", /, self_share: float = 0.0, **changes: Any) -> Row:
    dotted = {field.replace("__", "."): value for field, value in changes.items()}
    return Row(name, depth, {"task": "contrast", "contrast.pairs": "all", **dotted}, self_share)


def _complete(depth: Depth) -> Row:
    name = "FPCN, mask, centre, alpha" + _STAGE * (depth == "stage")
    return _fpcn(name, depth, model__region="threshold", model__area_scale=True, contrast__center_weight=0.5)


def _linear(name: str = LINEAR, depth: Depth = "head", **changes: Any) -> Row:
    return Row(name, depth, {"task": "classify", **changes})


def _pairs(depth: Depth = "head") -> Row:
    return _fpcn(PAIRS + _STAGE * (depth == "stage"), depth)


def _gates(batch: int) -> Row:
    hardest = {"contrast__pairs": "hardest", "contrast__num_pairs": 2 * batch}
    return _fpcn("FPCN, gates on the hardest pairs", model__head="gated", **hardest)


def _best(batch: int) -> Iterator[Row]:
    yield Row(PROBE, "probe", {}, seeds=1)
    yield _linear()
    yield _fpcn("FPCN, each image with itself", self_share=1.0)
    yield _gates(batch)
    yield _pairs()
    yield _complete("head")
    yield _linear(PLAIN, "stage")
    yield _pairs("stage")
    yield _complete("stage")


def _ablation() -> Iterator[Row]:
    for depth in ("head", "stage"):
        end = _STAGE * (depth == "stage")
        yield _pairs(depth)
        yield _fpcn(f"FPCN, mask{end}", depth, model__region="threshold", model__area_scale=False)
        yield _fpcn(f"FPCN, centre{end}", depth, contrast__center_weight=0.5)
        yield _fpcn(f"FPCN, mask, alpha{end}", depth, model__region="threshold", model__area_scale=True)
        center = {"model__area_scale": False, "contrast__center_weight": 0.5}
        yield _fpcn(f"FPCN, mask, centre{end}", depth, model__region="threshold", **center)
        yield _complete(depth)


def _numbers(batch: int) -> Iterator[Row]:
    for kind, multiples in (("random", (1, 2, 4, 8, 16, 32)), ("shifts", (1, 2, 4, 8)), ("hardest", (2, 4, 8))):
        for multiple in multiples:
            if multiple < batch:
                pairs = {"contrast__pairs": kind, "contrast__num_pairs": multiple * batch}
                yield _fpcn(f"FPCN, {kind}, {multiple * batch:,} pairs", **pairs)
    yield _pairs()


def _batches(batch: int, images_per_class: int, fewest: int) -> Iterator[Row]:
    classes, pairs = batch // images_per_class, 2 * batch
    for images in sorted({images_per_class, *(round(images_per_class * share) for share in (0.25, 0.5, 2, 3))}):
        if images >= 2 and images <= fewest and (images * classes) ** 2 >= pairs:
            changes = {"contrast__pairs": "random", "contrast__num_pairs": pairs, "data__images_per_class": images}
            yield _fpcn(f"FPCN, {pairs:,} random pairs of {images * classes} images", **changes)


def _whole() -> Iterator[Row]:
    yield _pairs()
    # One training takes minutes, as each of its steps contrasts a million pairs.
    yield _fpcn("FPCN, all pairs of all training images", data__images_per_class=None)._replace(seeds=1)


def _lambda() -> Iterator[Row]:
    for reduction in ("mean", "sum"):
        for weight in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0):
            changes = {"contrast__center_weight": weight, "contrast__center_reduction": reduction}
            yield _fpcn(f"FPCN, lambda {weight:g}, {reduction}", **changes)
    yield _pairs()


def _regular(batch: int) -> Iterator[Row]:
    yield _linear()
    smoothing: dict[str, Any] = {"loss.label_smoothing": 0.1}
    yield _linear("linear head, label smoothing 0.1", "head", **smoothing)
    yield _fpcn("FPCN, each image with itself", self_share=1.0)
    yield _fpcn("FPCN, nine tenths of the loss on the image with itself", self_share=0.9)
    yield _fpcn("FPCN, half of the loss on the image with itself", self_share=0.5)
    yield _fpcn("FPCN, all pairs, dropout 0.3", model__dropout=0.3)
    yield _gates(batch)
    yield _pairs()


def questions(only: str | None, batch: int, images_per_class: int, fewest: int) -> tuple[Question, ...]:
    """The questions of ``only``, separated by commas; all of them for ``None``.

    Args:
        only: keys of questions.
        batch: images of a batch of the recipe.
        images_per_class: of these, of each class.
        fewest: training images of the smallest class.

    Raises:
        UserError: there is no such question.
    """
    depths = {"probe": LINEAR, "head": LINEAR, "stage": PLAIN}
    pairs = {"head": PAIRS, "stage": PAIRS + _STAGE}
    same_pairs = tuple(_batches(batch, images_per_class, fewest))
    read = _pairs()._replace(readings=READINGS)
    every = (
        Question("best", "Which wins: probe, linear head, plain fine-tuning or FPCN?", tuple(_best(batch)), depths),
        Question("ablation", "What do region, centre loss and alpha add (Table 3)?", tuple(_ablation()), pairs),
        Question("pairs", "Do more pairs of a batch help (Figure 3)?", tuple(_numbers(batch)), pairs),
        Question("batch", "Does a larger batch help at the same number of pairs?", same_pairs, {}),
        Question("whole", "Do all pairs of all training images help?", tuple(_whole()), pairs),
        Question("lambda", "Which lambda, and which reduction of the centre loss?", tuple(_lambda()), pairs),
        Question("inference", "How is a photograph best classified after training on pairs?", (read,), pairs),
        Question("regular", "Do pairs act as regularisation?", tuple(_regular(batch)), depths),
    )
    keys = [question.key for question in every]
    wanted = keys if only is None else [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in keys:
            raise UserError("--only", name, "is no question of the study", nearest(name, keys))
    return tuple(question for question in every if question.key in wanted)


def rows_of(chosen: Sequence[Question]) -> tuple[Row, ...]:
    """The rows of some questions, each once; of all pairs with every reading, whichever question asks for it first."""
    rows = {row.name: row for question in chosen for row in question.rows}
    return tuple(row._replace(readings=READINGS) if row.name == PAIRS else row for row in rows.values())
