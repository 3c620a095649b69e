"""How well a model classifies: accuracy, confusion matrix, and accuracy by the size of the region (Figure 4).

Everything is counted on the device and summed over ranks once, at the end.

Shape legend: B images of a batch, K classes, H x W cells of the feature map.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fpcn_dist.data.batch import Batch
from fpcn_dist.models.classifier import object_share
from fpcn_dist.models.modes import autocast, evaluating
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import read_record, write_text

if TYPE_CHECKING:
    from fpcn_dist.models import Classifier

EVALUATION_FILE = "evaluation.json"
AREAS = ("0-25%", "25-50%", "50-75%", "75-100%")
"""Share of the feature map's cells inside the region, in the four parts of the paper's Figure 4."""


class Watcher(Protocol):
    """Whoever looks at the batches of an evaluation while it runs."""

    def update(self, batch: Batch, probabilities_BK: Tensor, mask_Bhw: Tensor) -> None:
        """Look at a batch; nothing may wait for the device."""


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class; ``None`` where a ratio is 0/0 (never predicted, or no images)."""

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    images: int


@dataclass(frozen=True)
class AreaScore:
    """Accuracy over the images whose region covers ``area`` of the feature map; ``None`` where there are none."""

    area: str
    images: int
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`; evaluation.json in a run folder.

    Attributes:
        split: the images: "train", "val" or "test" of the run; "all" of other images.
        checkpoint: name of the weights that were evaluated.
        step: optimizer steps that these weights have seen.
        images: number of images.
        loss: mean cross-entropy of the single-image logits.
        accuracy: share of images whose most probable class is the true one.
        per_class: scores in class order.
        confusion: [K][K] counts; rows are true classes, columns predicted ones.
        area_quartiles: one entry for each of :data:`AREAS`.
        data: where other images than the run's lie; ``None`` for the run's own.
    """

    split: str
    checkpoint: str
    step: int
    images: int
    loss: float
    accuracy: float
    per_class: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    area_quartiles: tuple[AreaScore, ...]
    data: str | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(score.name for score in self.per_class)

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes of the share of their images that is found; also in evaluation.json."""
        return balanced_accuracy(self.confusion)

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        values["per_class"] = [{"class": score.pop("name"), **score} for score in values["per_class"]]
        if self.data is None:
            del values["data"]
        values["balanced_accuracy"] = self.balanced_accuracy
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: not JSON, or not an evaluation.
        """
        try:
            values = json.loads(text)
            values.pop("balanced_accuracy", None)  # follows from the confusion; files of earlier versions lack it
            values["per_class"] = tuple(ClassScore(name=score.pop("class"), **score) for score in values["per_class"])
            values["area_quartiles"] = tuple(AreaScore(**score) for score in values["area_quartiles"])
            values["confusion"] = tuple(tuple(row) for row in values["confusion"])
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an evaluation ({type(error).__name__}: {error})") from error

    def save(self, run_dir: Path, name: str = EVALUATION_FILE) -> None:
        """Write ``run_dir``/evaluation.json, or another file beside it."""
        write_text(Path(run_dir) / name, self.to_json() + "\n")

    @classmethod
    def load(cls, run_dir: Path, name: str = EVALUATION_FILE) -> Evaluation | None:
        """Read ``run_dir``/evaluation.json, or another file beside it; ``None`` where there is none yet.

        Raises:
            UserError: the file is damaged.
        """
        return read_record(Path(run_dir) / name, cls.from_json, "evaluate the run again")


class Evaluator:
    """Counts what a network makes of batches, on its device; ranks are summed up once, at the end.

    Args:
        model: the bare network, on its device; its modes (train, eval) come back unchanged after each batch.
        classes: K class names in label order.
        precision: "fp32" or "bf16" (autocast).
        samples: takes the images worth showing in the report.
    """

    def __init__(
        self, model: Classifier, classes: Sequence[str], *, precision: str = "fp32", samples: Watcher | None = None
    ) -> None:
        self.model, self.classes, self.precision, self.samples = model, classes, precision, samples
        self.device = next(model.parameters()).device
        self._confusion = self._zeros(len(classes) ** 2)
        self._seen_by_area, self._correct_by_area = self._zeros(len(AREAS)), self._zeros(len(AREAS))
        self._loss = self._zeros(1, torch.float64)

    def _zeros(self, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def update(self, batch: Batch) -> None:
        """Classify one batch; nothing here waits for the device."""
        with evaluating(self.model), autocast(self.device, self.precision):
            pool = self.model.pool(batch.images)
            logits_BK = self.update_pooled(pool.pooled, object_share(pool.mask), batch.labels)
        if self.samples is not None:
            self.samples.update(batch, logits_BK.softmax(dim=1), pool.mask)

    @torch.inference_mode()
    def update_pooled(self, pooled_BC: Tensor, share_B: Tensor, labels_B: Tensor) -> Tensor:
        """Classify pooled vectors, with the share of the feature map inside the region; returns their logits.

        A frozen network need not be put into evaluation mode for that: its logits know no modes.
        """
        logits_BK = self.model.logits(pooled_BC)
        predicted = logits_BK.argmax(dim=1)
        quartile = (share_B * len(AREAS)).long().clamp(max=len(AREAS) - 1)
        cell = labels_B * len(self.classes) + predicted
        self._confusion.index_add_(0, cell, torch.ones_like(cell))
        self._seen_by_area.index_add_(0, quartile, torch.ones_like(quartile))
        self._correct_by_area.index_add_(0, quartile, (predicted == labels_B).long())
        self._loss += F.cross_entropy(logits_BK, labels_B, reduction="sum")
        return logits_BK

    def result(
        self,
        *,
        num_images: int,
        split: str = "val",
        checkpoint: str = "",
        step: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> Evaluation:
        """Scores of what all ranks of ``group`` have counted; see :func:`evaluate`. Collective.

        Raises:
            RuntimeError: the ranks saw more or fewer images than ``num_images``; the counts are named rank by rank.
        """
        counts, seen, correct, loss, by_rank = self._totals(group)
        images = int(by_rank.sum())
        if images != num_images:
            shares = ", ".join(f"rank {index}: {int(count)}" for index, count in enumerate(by_rank))
            raise RuntimeError(f"evaluation on {split!r} saw {images} of {num_images} images ({shares})")
        matrix = counts.long().view(len(self.classes), len(self.classes))
        return Evaluation(
            split=split,
            checkpoint=checkpoint,
            step=step,
            images=images,
            loss=loss.item() / images,
            accuracy=matrix.diagonal().sum().item() / images,
            per_class=_class_scores(self.classes, matrix),
            confusion=tuple(tuple(row) for row in matrix.tolist()),
            area_quartiles=tuple(
                AreaScore(area, int(total), _ratio(hits, total))
                for area, total, hits in zip(AREAS, seen.tolist(), correct.tolist(), strict=True)
            ),
        )

    def _totals(self, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
        """Confusion, seen and correct by area, sum of losses over all ranks; and the images that each rank saw."""
        rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        seen_by_rank = self._zeros(world_size, torch.float64)
        seen_by_rank[rank] = self._confusion.sum()
        parts = [self._confusion, self._seen_by_area, self._correct_by_area, self._loss, seen_by_rank]
        # One float64 vector for one collective; counts stay exact up to 2^53.
        totals = torch.cat([part.double() for part in parts])
        if group is not None:
            dist.all_reduce(totals, group=group)
        return totals.cpu().split([part.numel() for part in parts])


def evaluate(
    model: Classifier,
    loader: Iterable[Batch],
    classes: Sequence[str],
    *,
    num_images: int,
    split: str = "val",
    checkpoint: str = "",
    step: int = 0,
    precision: str = "fp32",
    group: dist.ProcessGroup | None = None,
    samples: Watcher | None = None,
) -> Evaluation:
    """Classify every image that the ranks' loaders yield; the same result on every rank.

    Args:
        model, classes, precision, samples: see :class:`Evaluator`.
        loader: this rank's batches; the ranks' shares are disjoint and may be uneven or empty.
        num_images: images that all ranks should see together.
        split, checkpoint, step: what is evaluated, noted in the result.
        group: ranks that evaluate together; ``None`` is this process alone.

    Raises:
        UserError: there are no images.
        RuntimeError: the ranks saw more or fewer images than ``num_images``; the counts are named rank by rank.
    """
    if num_images == 0:
        raise UserError("split", split, "has no images", "choose another split, or raise data.val_fraction")
    evaluator = Evaluator(model, classes, precision=precision, samples=samples)
    for batch in loader:
        evaluator.update(batch)
    return evaluator.result(num_images=num_images, split=split, checkpoint=checkpoint, step=step, group=group)


def balanced_accuracy(confusion: Sequence[Sequence[int]]) -> float:
    """Mean recall of the classes that have images; ``confusion`` [K][K] has true classes as rows."""
    recalls = [row[label] / sum(row) for label, row in enumerate(confusion) if sum(row)]
    return sum(recalls) / len(recalls)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _class_scores(classes: Sequence[str], confusion_KK: Tensor) -> tuple[ClassScore, ...]:
    """Precision, recall and F1 = 2 TP / (2 TP + FP + FN) of each class."""
    hits, truths, predictions = (
        counts.tolist() for counts in (confusion_KK.diagonal(), confusion_KK.sum(dim=1), confusion_KK.sum(dim=0))
    )
    return tuple(
        ClassScore(
            name,
            _ratio(hits[k], predictions[k]),
            _ratio(hits[k], truths[k]),
            _ratio(2 * hits[k], truths[k] + predictions[k]),
            truths[k],
        )
        for k, name in enumerate(classes)
    )
