"""What lies below a folder, and which of its files are images, told by their names. Imports no torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fpcn_dist.data.index.folder.strangers import find_strangers, is_inside
from fpcn_dist.runtime.errors import UserError

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
        *(".gif", ".heic", ".heif", ".avif"),
    }
)


class Listing(NamedTuple):
    """What lies below a folder. Paths are relative to it, with forward slashes; the folder itself is "".

    Attributes:
        folders: the names of the files directly in each folder, by its path. All folders are there, the empty ones and
            the folder itself, too, but not the hidden ones. A link to a folder is listed as a folder, where that folder
            is not listed already.
        unreadable: why a folder, or what a link leads to, cannot be read, by its path.
        same: the folder, listed under another path, that a link leads to, by the link's path; ``None`` where it lies
            above the listed one.
    """

    folders: dict[str, list[str]]
    unreadable: dict[str, str]
    same: dict[str, str | None]


def is_image(name: str) -> bool:
    """Whether a file is an image, by the suffix of its name, whatever its case; hidden files are none."""
    dot = name.rfind(".")  # os.path.splitext takes half of the time that a million names need
    return name[dot:].lower() in SUFFIXES and dot > 0 and not name.startswith(".")


def list_folder(root: Path) -> Listing:
    """Walk through a folder on this machine.

    Every real folder is listed once, however many links lead to it: where it lies, or else under the first of the
    links, by name. So a link to a folder above it ends where it begins.
    """
    listing = Listing({}, {}, {})
    seen: dict[tuple[int, int], str | None] = {_identity(parent): None for parent in root.resolve().parents}
    links = _walk(root, "", listing, seen)
    while links:
        links += _walk(root, links.popleft(), listing, seen)
    return listing


def _walk(root: Path, start: str, listing: Listing, seen: dict[tuple[int, int], str | None]) -> deque[str]:
    """List ``start`` and the real folders below it; returns the links to folders, sorted, which are not followed."""
    links, pending = [], [start]
    while pending:
        folder = pending.pop()
        place = os.path.join(root, folder)
        try:
            identity = _identity(place)
            if identity in seen:
                listing.same[folder] = seen[identity]
                continue
            with os.scandir(place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            link = "a link: " if os.path.islink(place) else ""
            listing.unreadable[folder] = link + (error.strerror or str(error))
            continue
        seen[identity] = folder
        names = listing.folders[folder] = []
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith("."):
                    pending.append(path)
            elif not entry.is_symlink() or is_image(entry.name) or os.path.isfile(entry.path):
                names.append(entry.name)
            elif not entry.name.startswith("."):
                links.append(path)
    return deque(sorted(links))


def _identity(path: str | Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def find_images(folder: Path) -> Iterator[Path]:
    """Image files below a folder, at any depth, sorted; those of thumbnails and of own outputs are left out.

    Raises:
        UserError: a folder cannot be read.
    """
    listing = list_folder(folder)
    strangers = find_strangers(listing.folders, is_image)
    for path, reason in sorted(listing.unreadable.items()):
        if not is_inside(path, strangers):
            raise UserError("images", folder / path, f"cannot be read ({reason})", "change its permissions or move it")
    for place in sorted(listing.folders):
        if not is_inside(place, strangers):
            yield from (folder / place / name for name in listing.folders[place] if is_image(name))


def find_files(paths: Sequence[Path]) -> list[Path]:
    """All files that ``paths`` name, each once, in the given order; folders are searched at any depth, by name.

    Raises:
        UserError: no paths, no such path, a folder without images, or one that cannot be read.
    """
    named: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError("images", path, "there is no such file or folder", "check the path")
        files = list(find_images(path)) if path.is_dir() else [path]
        if not files:
            raise UserError("images", path, "holds no images", f"images end in {', '.join(sorted(SUFFIXES))}")
        for file in files:
            named.setdefault(file.absolute(), file)
    if not named:
        raise UserError("images", None, "none were given", "name at least one file or folder")
    return list(named.values())
