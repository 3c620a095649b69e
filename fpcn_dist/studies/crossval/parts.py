"""Photographs that nearly look alike stay together when the others are cut into folds.

Legend: N photographs, C channels of a feature vector.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text

ALIKE = 0.95
"""Cosine of two feature vectors from which on their photographs count as near-duplicates."""
Ids = NDArray[np.int64]
_FILE, _VALIDATION = "parts.csv", "validation"


class Parts:
    """Folds, each of which is the test part once, and photographs for choosing that are never tested.

    Args:
        group_N: the group of near-duplicates of each photograph.
        part_N: its fold, or ``folds`` where it is for choosing.
        folds: their number.
    """

    def __init__(self, group_N: Ids, part_N: Ids, folds: int) -> None:
        self.group_N, self.part_N, self.folds = group_N, part_N, folds

    @property
    def validation(self) -> Ids:
        """Photographs that learning rates are chosen by."""
        return np.flatnonzero(self.part_N == self.folds)

    @property
    def tested(self) -> Ids:
        """Photographs of all folds."""
        return np.flatnonzero(self.part_N != self.folds)

    def test(self, fold: int) -> Ids:
        """Photographs of a fold."""
        return np.flatnonzero(self.part_N == fold)

    def train(self, fold: int) -> Ids:
        """Photographs of all other folds."""
        return np.flatnonzero((self.part_N != fold) & (self.part_N != self.folds))

    def save(self, folder: Path, manifest: Manifest) -> None:
        """Write ``folder``/parts.csv: each photograph with its label, group and part."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", "label", "group", "part"))
        for image, label, group, part in zip(
            manifest.images, manifest.labels.tolist(), self.group_N.tolist(), self.part_N.tolist(), strict=True
        ):
            named = _VALIDATION if part == self.folds else f"fold {part}"
            writer.writerow((image.path, manifest.classes[label], group, named))
        write_text(folder / _FILE, text.getvalue())

    @classmethod
    def load(cls, folder: Path) -> Parts:
        """Read what :meth:`save` wrote."""
        with open(folder / _FILE, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        folds = 1 + max(int(row["part"].removeprefix("fold ")) for row in rows if row["part"] != _VALIDATION)
        parts = [folds if row["part"] == _VALIDATION else int(row["part"].removeprefix("fold ")) for row in rows]
        return cls(np.array([int(row["group"]) for row in rows]), np.array(parts), folds)


def groups_of(features: Tensor) -> Ids:
    """[N] the group of each photograph by feature vectors [N, C]: near-duplicates of near-duplicates are in one."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    unit = torch.nn.functional.normalize(features, dim=1)
    return connected_components(csr_array((unit @ unit.T >= ALIKE).numpy()), directed=False)[1]


def cut(group_N: Ids, labels: Ids, folds: int, seed: int) -> Parts:
    """``folds`` folds and as large a part to choose by: classes in equal shares, groups whole.

    Raises:
        UserError: there are fewer groups than parts.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    part_N = np.empty(len(labels), dtype=np.int64)
    if (count := len(np.unique(group_N))) <= folds:
        reason = f"the {len(labels)} photographs are {count} groups of near-duplicates, which no part may tear apart"
        raise UserError("--folds", folds, reason, "add other photographs, or name a pretrained backbone")
    splitter = StratifiedGroupKFold(folds + 1, shuffle=True, random_state=seed)
    for part, (_, inside) in enumerate(splitter.split(labels, labels, group_N)):
        part_N[inside] = part
    return Parts(group_N, part_N, folds)
