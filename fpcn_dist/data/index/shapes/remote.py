"""A remote folder of images: the objects are listed once, and laid out by the rules of folders of this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from fpcn_dist.data.blob import Stored
from fpcn_dist.data.index.folders import Listing, is_image
from fpcn_dist.data.index.layout import Found, arrange
from fpcn_dist.data.remote.store import list_objects
from fpcn_dist.runtime.address import RemoteFolder
from fpcn_dist.runtime.errors import UserError

_OTHER_SHAPES = {".tar": "tar shards", ".parquet": "Parquet files"}
_OTHER_SHAPES |= dict.fromkeys((".csv", ".tsv", ".jsonl"), "tables")


def find(folder: RemoteFolder) -> Found:
    """The images of a remote folder, and what its store lists of them.

    Raises:
        UserError: it cannot be listed, is no folder of images, or it is unclear what is meant.
    """
    listed = list_objects(folder.url)
    if not any("/" in path and is_image(path.rpartition("/")[2]) for path in listed):
        _refuse_other_shapes(folder, listed)
    found = arrange(as_listing(listed), folder.url)
    return found._replace(stored={c.path: Stored(*listed[c.path]) for c in found.candidates})


def _refuse_other_shapes(folder: RemoteFolder, paths: Iterable[str]) -> None:
    shape = next(filter(None, (_OTHER_SHAPES.get(PurePosixPath(path).suffix.lower()) for path in paths)), None)
    if shape is not None:
        hint = "copy the data to this machine, and name the folder there"
        raise UserError("--data", folder, f"it holds {shape}, which are read on this machine alone", hint)


def as_listing(paths: Iterable[str]) -> Listing:
    """The folders that the paths of objects stand for, and the files directly in each."""
    folders: dict[str, list[str]] = {"": []}
    for path in paths:
        *above, name = path.split("/")
        if any(part.startswith(".") for part in above):
            continue
        for depth in range(1, len(above) + 1):
            folders.setdefault("/".join(above[:depth]), [])
        folders["/".join(above)].append(name)
    return Listing(folders, {}, {})
