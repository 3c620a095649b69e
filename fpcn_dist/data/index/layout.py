"""Which files of a data folder belong to which class and which split.

Two forms of folder are read, in both of which a class is a folder of images (JPEG, PNG, WebP, BMP, TIFF), which may lie
in folders of their own below it; names that start with a dot are ignored:

- ``DIR/<class>/...``: every class is split with ``val_fraction`` and ``test_fraction``;
- ``DIR/train/<class>/...``, where ``DIR/val/`` (or ``validation/``) and ``DIR/test/`` may lie beside it. Without a
  validation folder, ``val_fraction`` of the training images become the validation images. Without a test folder there
  is no test split: what is measured is then measured on the validation images. Other folders are ignored.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fpcn_dist.data.index.folders import SUFFIXES, find_images
from fpcn_dist.runtime.errors import UserError

_SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


class Candidate(NamedTuple):
    """An image file as found: its path relative to the data folder, its class, and its split where its folder says."""

    path: str
    name: str
    split: str | None


def find(root: Path) -> list[Candidate]:
    """All image files of a data folder; refuses what is no data folder."""
    form = "give a folder with one sub-folder of images for each class"
    if not root.exists():
        raise UserError("--data", root, "there is no such folder", form)
    if not root.is_dir():
        raise UserError("--data", root, "it is not a folder", form)

    splits = {folder: _SPLIT_FOLDERS[folder.name] for folder in _folders(root) if folder.name in _SPLIT_FOLDERS}
    if splits and "train" not in splits.values():
        found = ", ".join(f"{folder.name}/" for folder in splits)
        raise UserError("--data", root, f"it has {found} but no train/", "put the training images into train/<class>/")
    places: dict[Path, str | None] = {**splits} if splits else {root: None}

    candidates, classes_of = [], {}
    for place, split in places.items():
        found = [
            Candidate(PurePosixPath(path.relative_to(root)).as_posix(), folder.name, split)
            for folder in _folders(place)
            for path in find_images(folder)
        ]
        classes_of[place] = {candidate.name for candidate in found}
        candidates += found
    _check_classes(root, classes_of, form)
    return candidates


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _check_classes(root: Path, classes_of: dict[Path, set[str]], form: str) -> None:
    """Refuse folders without at least two classes, the same in every split."""
    first, *others = sorted(classes_of, key=lambda place: _SPLIT_FOLDERS.get(place.name) != "train")
    if not classes_of[first]:
        raise UserError("--data", root, f"no sub-folder of {first} holds images ({' '.join(sorted(SUFFIXES))})", form)
    if len(classes_of[first]) == 1:
        reason = f"it holds one class only ({min(classes_of[first])!r}), and there is nothing to tell apart"
        raise UserError("--data", root, reason, "add a folder of images of another class")
    for place in others:
        missing, extra = classes_of[first] - classes_of[place], classes_of[place] - classes_of[first]
        if missing or extra:
            only = [f"{name!r} is only in {first.name}/" for name in sorted(missing)]
            only += [f"{name!r} is only in {place.name}/" for name in sorted(extra)]
            hint = "give every split the same class folders"
            raise UserError("--data", root, f"the classes of its splits differ: {', '.join(only)}", hint)
