"""Data folders for tests: lists of what would lie in one, and images moved into folders of splits."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from fpcn_dist.data.index.folder.folders import Listing


def listing(
    folders: Mapping[str, int | list[str]],
    *,
    unreadable: Mapping[str, str] | None = None,
    same: Mapping[str, str | None] | None = None,
) -> Listing:
    """What lies below a data folder with these folders: so many images in each, or files of these names."""
    found: dict[str, list[str]] = {"": []}
    for folder, held in folders.items():
        parts = folder.split("/") if folder else []
        for length in range(len(parts) + 1):
            found.setdefault("/".join(parts[:length]), [])
        found[folder] = [f"{number:04d}.jpg" for number in range(held)] if isinstance(held, int) else held
    return Listing(found, dict(unreadable or {}), dict(same or {}))


def into_splits(folder: Path, **shares: slice) -> None:
    """Move the images of each class into ``folder/<split>/<class>/``; what is in no share is deleted."""
    for source in [path for path in folder.iterdir() if path.is_dir()]:
        files = sorted(source.iterdir())
        for split, share in shares.items():
            (folder / split / source.name).mkdir(parents=True)
            for file in files[share]:
                file.rename(folder / split / source.name / file.name)
        shutil.rmtree(source)
