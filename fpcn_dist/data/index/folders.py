"""Which files of a folder are images, told by their names. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fpcn_dist.runtime.errors import UserError

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
        *(".gif", ".heic", ".heif", ".avif"),
    }
)


def find_images(folder: Path) -> Iterator[Path]:
    """Image files below a folder, at any depth, sorted; told by their suffix, whatever its case."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(place, name)


def find_files(paths: Sequence[Path]) -> list[Path]:
    """All files that ``paths`` name, each once, in the given order; folders are searched at any depth, by name.

    Raises:
        UserError: no paths, no such path, or a folder without images.
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
