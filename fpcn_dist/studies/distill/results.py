"""What came out of a distillation, the analogue of the paper's Table 4: a table, distillation.json, report.html."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpcn_dist import __version__
from fpcn_dist.models.cost import Cost, measure
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.model_folder import load_model
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.distill import BASELINE

DISTILLATION_FILE = "distillation.json"


@dataclass(frozen=True)
class TeacherRow:
    """The teacher, as a row of the table.

    Attributes:
        folder: its run folder.
        sha256: hash of its weights file.
        backbone: name of its network.
        image_size: side in pixels of the images that it and its students see.
        cost: the cost of one such image.
        evaluation: what it scored, where that is known.
    """

    folder: Path
    sha256: str
    backbone: str
    image_size: int
    cost: Cost
    evaluation: Evaluation | None


@dataclass(frozen=True)
class StudentRow:
    """A student as a row of the table, trained with the teacher and perhaps without.

    Attributes:
        name: the name of its network.
        cost: the cost of one image; ``None`` where none of its runs left a model.
        distilled, baseline: what it scored with the teacher and without; ``None`` where there is no result.
        reasons: by the name of a run, why it has no result.
    """

    name: str
    cost: Cost | None
    distilled: Evaluation | None
    baseline: Evaluation | None
    reasons: Mapping[str, str]

    @property
    def runs(self) -> tuple[str, str]:
        """Names of its run folders, with the teacher and without."""
        return self.name, self.name + BASELINE

    @property
    def gain(self) -> float | None:
        """What the teacher added to the accuracy on the same images, in percentage points."""
        if self.distilled is None or self.baseline is None:
            return None
        if (self.distilled.split, self.distilled.images) != (self.baseline.split, self.baseline.images):
            return None
        return 100 * (self.distilled.accuracy - self.baseline.accuracy)


@dataclass(frozen=True)
class DistillationResults:
    """The table of a distillation: the teacher and every student.

    Attributes:
        teacher, students: the rows.
        baselines: whether students were trained without the teacher, too.
        device: what the milliseconds were measured on.
    """

    teacher: TeacherRow
    students: tuple[StudentRow, ...]
    baselines: bool
    device: str

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings of the columns of numbers."""
        accuracies = ("baseline %", "distilled %", "gain") if self.baselines else ("accuracy %",)
        return ("params M", "GFLOPs", "ms", *accuracies)

    def cells(self, row: TeacherRow | StudentRow) -> tuple[str, ...]:
        """The text under each of :attr:`headings`. The teacher had no teacher, so its accuracy is a baseline's."""
        if isinstance(row, TeacherRow):
            accuracies = (_percent(row.evaluation), "", "") if self.baselines else (_percent(row.evaluation),)
        elif self.baselines:
            gain = "-" if row.gain is None else f"{row.gain:+.1f}"
            accuracies = (_percent(row.baseline), _percent(row.distilled), gain)
        else:
            accuracies = (_percent(row.distilled),)
        return (*_costs(row.cost), *accuracies)

    @property
    def caption(self) -> str:
        """Sentences below the table that tell what its numbers mean."""
        size = self.teacher.image_size
        found = [score for row in self.students for score in (row.distilled, row.baseline) if score is not None]
        sentences = [
            f"GFLOPs: of one {size} x {size} image, two for each multiply-add, as torch.utils.flop_counter counts; "
            "the paper's Table 4 lists multiply-adds as FLOPs, which are half as many.",
            f"ms: one image at a time in float32 on {self.device}, median after a warm-up.",
        ]
        if found:
            sentences.append(f"Accuracy: on {found[0].images:,} {found[0].split} images.")
        own = self.teacher.evaluation
        if own is not None and found and (own.split, own.images) != (found[0].split, found[0].images):
            sentences.append(f"The teacher's is on {own.images:,} {own.split} images and does not compare.")
        if self.baselines:
            sentences.append("Gain: distilled less baseline, in percentage points.")
        return " ".join(sentences)

    def to_json(self) -> str:
        """The table as written to distillation.json: FLOPs two per multiply-add, accuracies as shares of 1."""
        teacher = self.teacher
        values = {
            "fpcn_dist_version": __version__,
            "device": self.device,
            "image_size": teacher.image_size,
            "teacher": {
                "folder": str(teacher.folder),
                "sha256": teacher.sha256,
                "backbone": teacher.backbone,
                **teacher.cost._asdict(),
                "evaluation": _score(teacher.evaluation),
            },
            "students": [
                {
                    "student": row.name,
                    **(row.cost or _UNKNOWN)._asdict(),
                    "distilled": _score(row.distilled),
                    "baseline": _score(row.baseline),
                    "gain_points": row.gain,
                    "reasons": dict(row.reasons),
                }
                for row in self.students
            ],
        }
        return json.dumps(values, indent=2)


_UNKNOWN: Any = Cost(*[None] * len(Cost._fields))  # pyright: ignore[reportArgumentType]


def read_student(
    output: Path, name: str, reasons: Mapping[str, str], device: torch.device, baselines: bool
) -> StudentRow:
    cost, found, missing = None, {}, {}
    for run in (name, name + BASELINE) if baselines else (name,):
        try:
            evaluation = None if run in reasons else Evaluation.load(output / run)
            if evaluation is None:
                missing[run] = reasons.get(run, "it was not evaluated")
                continue
            if cost is None:  # the baseline is the same network
                model, info = load_model(output / run, device)
                cost = measure(model, info.preprocessing.crop, device)
            found[run] = evaluation
        except UserError as error:  # one damaged folder must not hide what the others have learned
            missing[run] = str(error)
    return StudentRow(name, cost, found.get(name), found.get(name + BASELINE), missing)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread(s)"


def _costs(cost: Cost | None) -> Iterator[str]:
    if cost is None:
        return iter(["-"] * len(Cost._fields))
    return _three_digits((cost.parameters / 1e6, cost.flops / 1e9, cost.milliseconds))


def _three_digits(values: Iterable[float]) -> Iterator[str]:
    return (f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".") for value in values)


def _percent(evaluation: Evaluation | None) -> str:
    return "-" if evaluation is None else f"{100 * evaluation.accuracy:.1f}"


def _score(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {"accuracy": evaluation.accuracy, "split": evaluation.split, "images": evaluation.images}
