"""Images that a run is evaluated on though it was not trained beside them: its own, moved elsewhere, or others."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.notices import show_notices
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.cores import usable_cores
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import first_few, printable

EVERYTHING = "all"
"""The split of images that belong to no run."""


def require_same_images(manifest: Manifest, ids: Iterable[int], what: str, hint: str) -> None:
    """Read images of a manifest whose root is another folder now, and refuse those that are not the run's.

    Args:
        manifest: the run's, with its new root.
        ids: the images that are needed.
        what: they are called so in the error.
        hint: what to do where they are others.

    Raises:
        UserError: images are missing, or have other contents under the same name.
    """
    ids = list(ids)
    with ThreadPoolExecutor(usable_cores()) as pool:
        digests = list(pool.map(_digest, map(manifest.blob, ids)))
    paths = [manifest.images[index].path for index in ids]
    missing = [path for path, digest in zip(paths, digests, strict=True) if digest is None]
    changed = [
        path
        for path, index, digest in zip(paths, ids, digests, strict=True)
        if digest is not None and digest != manifest.images[index].digest
    ]
    parts = [
        f"{len(some):,} {state} ({first_few(some, 5)})"
        for some, state in ((changed, "have other contents there"), (missing, "are not there"))
        if some
    ]
    if parts:
        raise UserError("--data", manifest.root, f"of the run's {len(ids):,} {what}, {' and '.join(parts)}", hint)


def _digest(blob: Blob) -> str | None:
    try:
        return hashlib.sha256(blob.read()).hexdigest()
    except OSError:
        return None


class OtherImages(NamedTuple):
    """Labelled images of no run.

    Attributes:
        manifest: of the images.
        labels: [N] their classes, as the run counts them.
        without: classes of the run that have no images here.
        trained_on: how many of them are training images of the run.
    """

    manifest: Manifest
    labels: NDArray[np.int64]
    without: list[str]
    trained_on: int


def find_others(data: Address, recipe: Recipe) -> Manifest:
    """All images of a data folder, whatever their split; prints what there is to know about them.

    Raises:
        UserError: see :func:`fpcn_dist.data.index.build.build_manifest`.
    """
    # What a batch of the training needs is not asked of images that are only looked at.
    asked = {"classes_per_batch": None, "images_per_class": 1, "val_fraction": 0.0, "test_fraction": 0.0}
    manifest = build_manifest(data, recipe.data.changed(**asked), recipe.seed)
    show_notices(manifest.refused, manifest.notices)
    return manifest


def with_labels_of(own: Manifest, others: Manifest) -> OtherImages:
    """Match the classes of other images with those of the run, by their names.

    Composed and decomposed forms of a name are the same, unless the run tells them apart.

    Raises:
        UserError: the run knows no such class.
    """
    label_of = _by_form(own.classes) | {name: label for label, name in enumerate(own.classes)}
    labels = [label_of.get(name, label_of.get(unicodedata.normalize("NFC", name))) for name in others.classes]
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        unknown = [repr(name) for name, label in zip(others.classes, labels, strict=True) if label is None]
        reason = f"the model knows no class {first_few(unknown, 5)}; it knows {first_few(map(repr, own.classes), 20)}"
        raise UserError("--data", others.root, reason, "name the folders as the model's classes, or move them away")
    trained = {own.images[index].digest for index in own.ids("train").tolist()}
    return OtherImages(
        others,
        np.array(known, dtype=np.int64)[others.labels],
        [name for label, name in enumerate(own.classes) if label not in known],
        sum(image.digest in trained for image in others.images),
    )


def _by_form(classes: Sequence[str]) -> dict[str, int]:
    """Labels by the composed form of each name, where only one class has it."""
    forms = [unicodedata.normalize("NFC", name) for name in classes]
    return {form: label for label, form in enumerate(forms) if forms.count(form) == 1}


def remarks(others: OtherImages) -> list[str]:
    """What a reader of the numbers should know, a line each."""
    lines = []
    if others.without:
        lines.append(f"no images of {len(others.without)} class(es) of the model: {first_few(others.without)}")
    if others.trained_on:
        lines.append(f"warning: the model was trained on {others.trained_on:,} of these images")
    return [printable(line) for line in lines]
