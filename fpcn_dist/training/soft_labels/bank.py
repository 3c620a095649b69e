"""The soft-label bank: a teacher's raw logits of some views of each training image, computed once for every student:
for every temperature, alpha, student and retry."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import ViewLoader
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.training.view_bank import Ids, ViewBank

_FORMAT = 1


class SoftLabelBank(ViewBank):
    """Rows are the K raw logits of a teacher.

    Args:
        folder: of :func:`prepare_bank`, which the first rank or the driver has called.
        recipe: whose seed, views and sizes the bank has.
        manifest: the images.
    """

    ROWS, TITLE, CONTENT, FIELD = "logits.f32", "soft-label bank", "logits", "distill.bank"

    def __init__(self, folder: Path, recipe: Recipe, manifest: Manifest) -> None:
        self.recipe, self.manifest = recipe, manifest
        classes, views = len(manifest.classes), recipe.data.views
        assert recipe.distill.teacher_sha256 is not None and views is not None
        key = {
            "format": _FORMAT,
            "manifest": manifest.hash,
            "teacher": recipe.distill.teacher_sha256,
            "seed": recipe.seed,
            **recipe.data.pixels(),
            "precision": recipe.train.precision,
        }
        ids, whole = manifest.ids("train"), recipe.data.images_per_class is None
        # As many views as a batch of one rank has: the teacher then rounds as it does in that rank's steps.
        chunk = recipe.data.eval_batch_size if whole else recipe.data.batch_size(classes)
        super().__init__(folder, key, ids, views=views, width=classes, chunk=chunk)

    def loader(self, image_ids: Ids, view_ids: Ids, size: int, device: torch.device) -> Iterable[Batch]:
        config = self.recipe.data.changed(eval_batch_size=size)
        return ViewLoader(self.manifest, config, self.recipe.seed, image_ids, view_ids, device)

    def __call__(self, image_ids: NDArray[np.int64], view_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, K] of B views."""
        return np.asarray(self.rows[self.row_of[image_ids], view_ids])


def prepare_bank(folder: Path, recipe: Recipe, manifest: Manifest) -> SoftLabelBank:
    """The bank in ``folder``: the one that is there, whole or in part, or a new and empty one.

    Raises:
        UserError: see :meth:`ViewBank.prepare`.
    """
    bank = SoftLabelBank(folder, recipe, manifest)
    bank.prepare()
    return bank
