"""A report shows a few images: some classified correctly, and the mistakes that the model was surest of.

They are picked during the evaluation itself, on the device and without waiting for it, so that nothing is decoded or
computed twice.

Shape legend: B images of a batch, K classes, H x W pixels, h x w cells of the feature map.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runs.report.overlay import draw_overlay, to_pixels
from fpcn_dist.runtime.files import replacing, write_text

FOLDER = "samples"
SIDE = 256
"""A sample in the report is so many pixels wide and high."""

_KNUTH = 2654435761  # multiplicative hash: scatters image ids, the same whatever the number of ranks


@dataclass(frozen=True)
class Sample:
    """A sample is one image of the report, an entry of samples/samples.json.

    Attributes:
        file: JPEG with the overlay, relative to samples/.
        image: path in the data set.
        truth, predicted: class names.
        probability: of the predicted class.
        object_share: share of the image inside the region.
    """

    file: str
    image: str
    truth: str
    predicted: str
    probability: float
    object_share: float

    @property
    def correct(self) -> bool:
        return self.truth == self.predicted


def read_samples(run_dir: Path) -> list[Sample]:
    """Read the entries of ``run_dir``/samples/samples.json whose image is there; none where nothing was collected."""
    index = Path(run_dir) / FOLDER / "samples.json"
    if not index.is_file():
        return []
    samples = [Sample(**entry) for entry in json.loads(index.read_text(encoding="utf-8"))]
    return [sample for sample in samples if (index.parent / sample.file).is_file()]


class SampleCollector:
    """It keeps the images to show while :func:`fpcn_dist.runs.evaluation.evaluate` runs; :meth:`write` saves them.

    Args:
        config: how the images are normalised.
        per_kind: how many correct images (chosen by a hash of their id), and how many mistakes (the most probable).
    """

    def __init__(self, config: DataConfig, per_kind: int = 6) -> None:
        self._config, self._per_kind = config, per_kind
        self._kept: dict[str, dict[str, Tensor]] = {}

    def update(self, batch: Batch, probabilities_BK: Tensor, mask_Bhw: Tensor) -> None:
        """Look at one batch; nothing here waits for the device."""
        probability, predicted = probabilities_BK.max(dim=1)
        correct = predicted == batch.labels
        scattered = (batch.image_ids * _KNUTH % 2**32) / 2**32
        columns = {"images": batch.images, "masks": mask_Bhw, "image_ids": batch.image_ids, "labels": batch.labels}
        columns |= {"predicted": predicted, "probability": probability}
        self._keep("correct", torch.where(correct, scattered, -1.0), columns)
        self._keep("mistakes", torch.where(correct, -1.0, probability), columns)

    def _keep(self, kind: str, score: Tensor, columns: dict[str, Tensor]) -> None:
        """Merge the best of a batch with the best so far; a score below zero is never shown."""
        best = score.float().topk(min(self._per_kind, len(score))).indices
        candidates = {"score": score.float()[best], **{name: column[best] for name, column in columns.items()}}
        if kind in self._kept:
            candidates = {name: torch.cat([self._kept[kind][name], column]) for name, column in candidates.items()}
            best = candidates["score"].topk(min(self._per_kind, len(candidates["score"]))).indices
            candidates = {name: column[best] for name, column in candidates.items()}
        self._kept[kind] = candidates

    def write(
        self,
        run_dir: Path,
        classes: Sequence[str],
        paths: Sequence[str],
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Write ``run_dir``/samples/: JPEG overlays and samples.json. All ranks of ``group`` call it; its first writes.

        Args:
            run_dir: the run folder.
            classes: class names in label order.
            paths: path of each image of the data set, by image id.
            group: ranks that evaluated together; ``None`` is this process alone.
        """
        mine = {kind: {name: column.cpu() for name, column in kept.items()} for kind, kept in self._kept.items()}
        everyone = [mine]
        if group is not None:
            everyone = [{}] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
            dist.gather_object(mine, everyone, group=group, group_dst=0)
        if everyone is None:
            return
        folder = Path(run_dir) / FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        samples = []
        for kind in ("correct", "mistakes"):
            merged = _merge([kept[kind] for kept in everyone if kind in kept])
            rows = [row for row in merged.get("score", torch.empty(0)).argsort(descending=True).tolist()]
            shown = [row for row in rows if merged["score"][row] >= 0][: self._per_kind]
            for number, row in enumerate(shown):
                mask = merged["masks"][row].float()
                sample = Sample(
                    file=f"{kind}-{number}.jpg",
                    image=paths[int(merged["image_ids"][row])],
                    truth=classes[int(merged["labels"][row])],
                    predicted=classes[int(merged["predicted"][row])],
                    probability=float(merged["probability"][row]),
                    object_share=float((mask == 1).float().mean()),
                )
                with replacing(folder / sample.file) as temporary:
                    drawing = draw_overlay(to_pixels(merged["images"][row], self._config), mask.numpy(), SIDE)
                    drawing.save(temporary, format="JPEG", quality=82)
                samples.append(sample)
        write_text(folder / "samples.json", json.dumps([asdict(sample) for sample in samples], indent=2) + "\n")


def _merge(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
