"""The manifest: which images a run uses, in which split, and a hash that changes with any of it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpcn_dist.data.blob import Blob, Stored
from fpcn_dist.data.index.check.images import Refused
from fpcn_dist.data.index.notices import Notice
from fpcn_dist.runtime.address import is_url
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text

if TYPE_CHECKING:
    from fpcn_dist.runtime.ranks import Ranks

SPLIT_FIELDS = ("seed", "data.split_seed", "data.val_fraction", "data.test_fraction")
"""Recipe fields that decide which images train, validate and test."""
CHECK_FIELDS = ("data.on_bad_image", "data.on_duplicate", "data.max_pixels", "data.columns")
"""Recipe fields that decide which images are usable at all. A manifest depends on these and on the split's alone."""


class Image(NamedTuple):
    """One usable image.

    Attributes:
        path: relative to the data folder, with forward slashes.
        label: index of its class.
        split: ``train``, ``val`` or ``test``.
        size: bytes.
        digest: SHA-256 of its bytes.
        place: where its bytes lie, in a file relative to the data folder; ``None`` where it is a file of its own.
    """

    path: str
    label: int
    split: str
    size: int
    digest: str
    place: Blob | None = None

    @classmethod
    def from_list(cls, values: list[Any]) -> Image:
        """What was a list in JSON."""
        image = cls(*values)
        return image if image.place is None else image._replace(place=Blob.from_list(image.place))


def folder_of(data: str) -> str:
    """The folder that names of images are relative to: ``--data`` itself, or where the file lies that it names."""
    if is_url(data):
        return data
    named = os.path.isfile(data) or ("{" in os.path.basename(data) and not os.path.isdir(data))
    return os.path.dirname(data) if named else data


@dataclass(frozen=True)
class Manifest:
    """The images of a run. An image id is an index into ``images``.

    Attributes:
        root: the data folder, or the file that names or holds the images.
        classes: class names, sorted; a label is an index into them.
        images: the usable images, sorted by path.
        refused: the images that were left out.
        notices: what else there is to know about the data folder.
    """

    root: str
    classes: tuple[str, ...]
    images: tuple[Image, ...]
    refused: tuple[Refused, ...]
    notices: tuple[Notice, ...] = ()

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over classes, relative paths, splits and contents; where the folder lies plays no part.

        Nor does ``data.on_bad_image``: how a salvaged image is filled up follows from its contents, and unless it is to
        be salvaged, it is not among the images.
        """
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
        image = self.images[image_id]
        blob = Blob.within(self._folder, image.path, image.place)
        return blob._replace(stored=Stored(image.size, digest=image.digest)) if blob.is_remote else blob

    @functools.cached_property
    def _folder(self) -> str:
        return folder_of(self.root)

    def to_json(self) -> str:
        """Everything as JSON, one image a line; read back by :meth:`from_json`."""
        head = {"hash": self.hash, "root": self.root, "classes": self.classes, "refused": self.refused}
        head["notices"] = self.notices
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
            tuple(Image.from_list(image) for image in content["images"]),
            tuple(Refused(*refused) for refused in content["refused"]),
            tuple(Notice(*notice) for notice in content.get("notices", ())),  # files of earlier versions lack them
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


def on_every_rank(find: Callable[[], Manifest], ranks: Ranks) -> Manifest:
    """What ``find`` finds on the first rank, given to all of them. Collective."""
    found: list[Manifest] = []

    def on_first() -> str | None:
        found.append(find())
        # Of a million images the text takes seconds to write and to read.
        return found[0].to_json() if ranks.world_size > 1 else None

    text = ranks.on_first(on_first)
    return found[0] if found else Manifest.from_json(text)
