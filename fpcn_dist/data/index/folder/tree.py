"""The folders of a data folder as a tree, without those that are no part of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator

from fpcn_dist.data.index.folder.folders import Listing, is_image
from fpcn_dist.data.index.folder.strangers import is_inside


class Tree:
    """What lies in which folder. Folders are paths relative to the data folder, which itself is "".

    Attributes:
        images: the names of the images directly in each folder.
        others: the names of the other files directly in each folder, hidden ones included.
        children: the paths of the folders directly in each folder, sorted.
        total: how many images lie in each folder, at any depth.
    """

    def __init__(self, listing: Listing, strangers: Collection[str]) -> None:
        self.images: dict[str, list[str]] = {}
        self.others: dict[str, list[str]] = {}
        self.children: dict[str, list[str]] = {}
        self.total: Counter[str] = Counter()
        for folder in sorted(listing.folders):
            if not is_inside(folder, strangers):
                self._add(folder, listing.folders[folder])

    def _add(self, folder: str, names: list[str]) -> None:
        images = [name for name in names if is_image(name)]
        self.images[folder], self.children[folder] = images, []
        self.others[folder] = [name for name in names if not is_image(name)] if len(images) < len(names) else []
        self.total[folder] = len(images)
        if folder:
            self.children[_above(folder)].append(folder)
        while folder:
            folder = _above(folder)
            self.total[folder] += len(images)

    def below(self, folder: str) -> Iterator[str]:
        """The folder and all folders in it, at any depth."""
        yield folder
        for child in self.children[folder]:
            yield from self.below(child)

    def paths(self, folder: str) -> Iterator[str]:
        """The paths of the images in a folder, at any depth."""
        for place in self.below(folder):
            yield from (f"{place}/{name}" for name in self.images[place])

    def suffixes(self, folder: str) -> Counter[str]:
        """How many files that are no images lie in a folder, at any depth, by suffix in lower case; no hidden ones."""
        names = (name for place in self.below(folder) for name in self.others[place] if not name.startswith("."))
        return Counter(os.path.splitext(name)[1].lower() for name in names)

    def hidden(self, folder: str) -> list[str]:
        """The paths of the hidden files with the suffix of an image in a folder, at any depth."""
        return [
            f"{place}/{name}"
            for place in self.below(folder)
            for name in self.others[place]
            if name.startswith(".") and is_image(name.lstrip("._") or name)
        ]


def _above(folder: str) -> str:
    return folder.rpartition("/")[0]
