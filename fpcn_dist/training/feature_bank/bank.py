"""The feature bank: what a frozen backbone makes of some views of each training image, and of the validation images."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import EvalLoader, ViewLoader
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.training.view_bank import META, Ids, ViewBank, read_description

_FORMAT = 1


class FeatureBank(ViewBank):
    """Rows are for each region the pooled vector [C] and the share of the feature map inside the region.

    Args:
        folder: its own, for one split.
        recipe: whose seed, views, sizes, backbone and arithmetic the bank has.
        manifest: the images.
        split: "train", whose rows are the views of training; or "val", whose rows are the central crops.
        weights: hash of the backbone's weights.
        regions: names of the regions that a new bank holds; one that is there may hold more.
        channels: C.
        chunk: views that are computed at once in a new bank.
    """

    ROWS, TITLE, CONTENT, FIELD = "features.f32", "feature bank", "features", "train.feature_bank"

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        manifest: Manifest,
        split: str,
        *,
        weights: str,
        regions: Sequence[str],
        channels: int,
        chunk: int,
    ) -> None:
        self.recipe, self.manifest, self.split, self.channels = recipe, manifest, split, channels
        data = recipe.data
        views = data.distinct_views if split == "train" else 1
        assert views is not None, "else there is no end of views"
        pixels = data.pixels() | {"views": views}
        if data.views_are_drawn and split == "train":
            pixels["seed"] = recipe.seed
        key = {
            "format": _FORMAT,
            "manifest": manifest.hash,
            "split": split,
            "backbone": recipe.model.backbone,
            "weights": weights,
            **pixels,
            "precision": recipe.train.precision,
            "matmul": recipe.train.matmul,
            "regions": list(regions),
        }
        ids = manifest.ids(split)
        super().__init__(folder, key, ids, views=views, width=len(regions) * (channels + 1), chunk=chunk)

    @property
    def width(self) -> int:
        return len(self._regions) * (self.channels + 1)

    @property
    def _regions(self) -> list[str]:
        """The regions of the bank that is there, or else of the one that is to be."""
        return self._stored_regions if (self.folder / META).is_file() else self.key["regions"]

    @functools.cached_property
    def _stored_regions(self) -> list[str]:
        return read_description(self.folder).get("regions", [])

    def differences(self, found: dict[str, Any]) -> Iterator[str]:
        stored = found.get("regions", [])
        absent = [region for region in self.key["regions"] if region not in stored]
        yield from super().differences(found | {"regions": self.key["regions"]})
        if absent:
            yield f"region {' and '.join(map(repr, stored))} instead of {' and '.join(map(repr, absent))}"

    def loader(self, image_ids: Ids, view_ids: Ids, size: int, device: torch.device) -> Iterable[Batch]:
        config = self.recipe.data.changed(eval_batch_size=size)
        if self.split == "train":
            return ViewLoader(self.manifest, config, self.recipe.seed, image_ids, view_ids, device)
        blobs = [self.manifest.blob(image_id) for image_id in image_ids.tolist()]
        labels = self.manifest.labels[image_ids]
        return EvalLoader(blobs, labels, image_ids, config, rank=0, world_size=1, device=device)

    def open(self, region: str, device: torch.device) -> Features:
        """The features of one of its regions, on a device."""
        count = len(self.ids) * self.views
        table = torch.from_file(str(self.folder / self.ROWS), size=count * self.width, dtype=torch.float32)
        first = self._regions.index(region) * (self.channels + 1)
        row = torch.from_numpy(self.row_of).to(device)
        columns = table.view(count, self.width).to(device)[:, first : first + self.channels + 1]
        return Features(columns, row, self.views)


class Features:
    """One region of a bank: mapped into memory on the CPU, and in the memory of a GPU.

    Args:
        table: [images x views, C + 1].
        row: [largest id + 1] the row of each image id among the images.
        views: views of each image.
    """

    def __init__(self, table: Tensor, row: Tensor, views: int) -> None:
        self._table, self._row, self._views = table, row, views

    def __call__(self, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """[B, C] of B views; nothing here waits for the device."""
        return self._table[:, :-1][self._rows(image_ids, view_ids)]

    def with_share(self, image_ids: Tensor, view_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C] of B views, and [B] the share of the feature map inside the region."""
        rows = self._table[self._rows(image_ids, view_ids)]
        return rows[:, :-1].contiguous(), rows[:, -1]

    def _rows(self, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        return self._row[image_ids] * self._views + view_ids % self._views
