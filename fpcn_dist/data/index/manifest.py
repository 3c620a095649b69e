"""The manifest: which images a run uses, in which split, and a hash that changes with any of it.

Two forms of folder are read, in both of which a class is a folder of images (JPEG, PNG, WebP, BMP, TIFF), which may lie
in folders of their own below it; names that start with a dot are ignored:

- ``DIR/<class>/...``: every class is split with ``val_fraction`` and ``test_fraction``;
- ``DIR/train/<class>/...``, where ``DIR/val/`` (or ``validation/``) and ``DIR/test/`` may lie beside it. Without a
  validation folder, ``val_fraction`` of the training images become the validation images. Without a test folder there
  is no test split: what is measured is then measured on the validation images. Other folders are ignored.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.folders import SUFFIXES, find_images
from fpcn_dist.data.index.images import Check, Refused, cache_file, check_images
from fpcn_dist.data.sampler import check_composition
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text

SPLIT_FIELDS = ("seed", "data.split_seed", "data.val_fraction", "data.test_fraction")
"""Recipe fields that decide which images train, validate and test."""
CHECK_FIELDS = ("data.on_bad_image", "data.max_pixels")
"""Recipe fields that decide which images are usable at all. A manifest depends on these and on the split's alone."""

_SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


class Image(NamedTuple):
    """One usable image.

    Attributes:
        path: relative to the data folder, with forward slashes.
        label: index of its class.
        split: ``train``, ``val`` or ``test``.
        size: bytes.
        digest: SHA-256 of the file.
    """

    path: str
    label: int
    split: str
    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The images of a run. An image id is an index into ``images``.

    Attributes:
        root: the data folder.
        classes: class names, sorted; a label is an index into them.
        images: the usable images, sorted by path.
        refused: the images that were left out.
    """

    root: str
    classes: tuple[str, ...]
    images: tuple[Image, ...]
    refused: tuple[Refused, ...]

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over classes, relative paths, splits and contents; where the folder lies plays no part."""
        content = [self.classes, [(image.path, image.label, image.split, image.digest) for image in self.images]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """[len(images)] label of every image id."""
        return np.array([image.label for image in self.images], dtype=np.int64)

    def ids(self, split: str) -> NDArray[np.int64]:
        """Ids of the images of a split, ascending; empty where the data have no such split."""
        return self._ids_by_split.get(split, np.empty(0, dtype=np.int64))

    @functools.cached_property
    def _ids_by_split(self) -> dict[str, NDArray[np.int64]]:
        ids: dict[str, list[int]] = {}
        for index, image in enumerate(self.images):
            ids.setdefault(image.split, []).append(index)
        return {split: np.array(members, dtype=np.int64) for split, members in ids.items()}

    def class_counts(self, split: str) -> tuple[int, ...]:
        """How many images of a split each class has."""
        return tuple(np.bincount(self.labels[self.ids(split)], minlength=len(self.classes)).tolist())

    def blob(self, image_id: int) -> Blob:
        """Where the bytes of the image lie."""
        return Blob(os.path.join(self.root, self.images[image_id].path))

    def to_json(self) -> str:
        """Everything as JSON, one image a line; read back by :meth:`from_json`."""
        head = {"hash": self.hash, "root": self.root, "classes": self.classes, "refused": self.refused}
        images = ",\n".join(json.dumps(image) for image in self.images)
        return f'{json.dumps(head)[:-1]}, "fields": {json.dumps(Image._fields)}, "images": [\n{images}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that :meth:`to_json` wrote.

        Raises:
            ValueError, KeyError or TypeError: the text is something else, or was changed.
        """
        content = json.loads(text)
        manifest = cls(
            content["root"],
            tuple(content["classes"]),
            tuple(Image(*image) for image in content["images"]),
            tuple(Refused(*refused) for refused in content["refused"]),
        )
        if manifest.hash != content["hash"]:
            raise ValueError("the hash does not fit the images")
        return manifest

    def save(self, file: Path) -> None:
        """Write ``file`` as JSON, whole or not at all."""
        write_text(file, self.to_json())

    @classmethod
    def load(cls, file: Path) -> Manifest:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the file is missing, damaged or something else.
        """
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = "choose a run folder that is whole, or start a new run"
            raise UserError("manifest", file, f"cannot be read as a manifest ({error})", hint) from error


class _Candidate(NamedTuple):
    """An image file as found: its path relative to the data folder, its class, and its split where its folder says."""

    path: str
    name: str
    split: str | None


def build_manifest(root: Path, config: DataConfig, seed: int) -> Manifest:
    """Index an image folder, check every image, and split what has no split.

    The split depends on the seed and on the contents of the images, not on their names: images that are added later
    leave nearly all the others where they were. Each class keeps at least one training image.

    Args:
        root: the data folder, in one of the two forms of this module's docstring.
        config: fractions of the split, pixel bound, what to do about bad images, what a batch needs.
        seed: key of the split, unless the config has one of its own.

    Raises:
        UserError: no such folder, no classes or only one, classes that differ between splits, bad images where
            ``on_bad_image`` is ``fail``, too few classes or images for a batch, or a backend that is not installed.
    """
    root = Path(root)
    candidates = _find(root)
    paths = [root / c.path for c in candidates]
    checks = check_images(paths, config.max_pixels, cache_file(root), backend=config.backend)
    refused = [Refused(c.path, check.reason) for c, check in zip(candidates, checks, strict=True) if check.reason]
    if refused and config.on_bad_image == "fail":
        shown = "; ".join(f"{path}: {reason}" for path, reason in refused[:5]) + ("; ..." if len(refused) > 5 else "")
        hint = "mend or remove them, or set data.on_bad_image to 'skip'"
        raise UserError("--data", root, f"{len(refused)} image(s) cannot be used ({shown})", hint)

    given = {c.split for c in candidates}
    fractions = {} if "val" in given else {"val": config.val_fraction}
    if None in given:
        fractions["test"] = config.test_fraction
    members: dict[str, list[tuple[_Candidate, Check]]] = {candidate.name: [] for candidate in candidates}
    for candidate, check in zip(candidates, checks, strict=True):
        if check.ok:
            members[candidate.name].append((candidate, check))
    classes = sorted(members)
    images = []
    for label, name in enumerate(classes):
        for c, check, split in _split(
            members[name], fractions, seed if config.split_seed is None else config.split_seed
        ):
            images.append(Image(c.path, label, split, check.size, check.digest))
    counts = Counter(image.label for image in images if image.split == "train")
    check_composition(classes, [counts[label] for label in range(len(classes))], config)
    return Manifest(str(root.absolute()), tuple(classes), tuple(sorted(images)), tuple(refused))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _find(root: Path) -> list[_Candidate]:
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
            _Candidate(PurePosixPath(path.relative_to(root)).as_posix(), folder.name, split)
            for folder in _folders(place)
            for path in find_images(folder)
        ]
        classes_of[place] = {candidate.name for candidate in found}
        candidates += found
    _check_classes(root, classes_of, form)
    return candidates


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


def _split(
    members: Sequence[tuple[_Candidate, Check]], fractions: dict[str, float], seed: int
) -> Iterator[tuple[_Candidate, Check, str]]:
    """The images of one class with their splits: the folder's, or one that the contents and the seed decide."""

    def lot(member: tuple[_Candidate, Check]) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}/{member[1].digest}".encode()).digest(), member[0].path

    train = sorted((member for member in members if member[0].split in (None, "train")), key=lot)
    yield from ((c, check, c.split) for c, check in members if c.split in ("val", "test"))
    taken = 0
    for split, fraction in fractions.items():
        count = min(max(1, round(fraction * len(train))) if fraction else 0, max(0, len(train) - 1 - taken))
        yield from ((c, check, split) for c, check in train[taken : taken + count])
        taken += count
    yield from ((c, check, "train") for c, check in train[taken:])
