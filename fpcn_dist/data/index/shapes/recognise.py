"""Which shape the data at ``--data`` have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fpcn_dist.data.index import layout
from fpcn_dist.data.index.folders import find_images
from fpcn_dist.data.index.layout import Found
from fpcn_dist.data.index.shapes import parquet, remote, table, tar
from fpcn_dist.data.index.shapes.found import checked
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.runtime.address import Address, RemoteFolder
from fpcn_dist.runtime.errors import UserError

_DEPTH = 2
"""Folders below the data folder in which shards and Parquet files are looked for."""


class Shape(NamedTuple):
    """A shape that was recognised.

    Attributes:
        name: in words.
        find: finds the images.
    """

    name: str
    find: Callable[[], Found]


def recognise(data: Address, columns: ColumnsConfig) -> Shape:
    """The shape of a data set, told by names alone; a folder of images is what else it may be.

    Args:
        data: a folder, on this machine or remote; a table, a Parquet file, a tar shard; or a pattern of shards,
            ``shard-{000..012}.tar``.
        columns: the recipe's ``data.columns``.

    Raises:
        UserError: shards are compressed, so that nothing in them can be read alone; and by ``find``: there is nothing
            there, or nothing that can be used.
    """
    if isinstance(data, RemoteFolder):
        return Shape("a remote folder of images", lambda: remote.find(data))
    if data.is_dir():
        return _of_folder(data, columns) or Shape("a folder of images", lambda: layout.find(data))
    files = list(map(Path, tar.expand(str(data)))) if "{" in data.name else [data]
    suffix = files[0].suffix.lower()
    if suffix in table.SUFFIXES and len(files) == 1 and data.exists():
        return _table(data.parent, data, [data], columns)
    if suffix in (".tar", ".parquet") and (data.exists() or len(files) > 1):
        return _files(data, data.parent, files, columns)
    _refuse_compressed(data, files)
    return Shape("a folder of images", lambda: layout.find(data))


def _of_folder(data: Path, columns: ColumnsConfig) -> Shape | None:
    """The shape of a folder, unless it is one of images."""
    tables = table.find_metadata(data)
    if tables and (table.has_labels(tables[0], columns) or not _has_classes(data)):
        return _table(data, data, tables, columns)
    if _has_classes(data):
        return None
    below = sorted(_files_below(data, _DEPTH))
    for suffix in (".tar", ".parquet"):
        if files := [file for file in below if file.suffix.lower() == suffix]:
            return _files(data, data, files, columns)
    _refuse_compressed(data, below)
    return None


def _has_classes(data: Path) -> bool:
    """Whether images lie in two or more folders below the data folder; seldom more than a few are looked at."""
    places = {data}
    for folder in sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for image in find_images(folder):
            places.add(image.parent)
            if len(places) > 2:
                return True
    return False


def _files_below(folder: Path, depth: int) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if not entry.name.startswith("."):
            if entry.is_dir():
                if depth:
                    yield from _files_below(Path(entry), depth - 1)
            else:
                yield Path(entry)


def _table(root: Path, data: Path, files: list[Path], columns: ColumnsConfig) -> Shape:
    kind = table.SUFFIXES[files[0].suffix.lower()]
    name = f"a table of images ({kind})" if data == files[0] else f"a folder of images with a table ({files[0].name})"
    return Shape(name, lambda: checked(data, table.find(files, root, columns)))


def _files(data: Path, root: Path, files: list[Path], columns: ColumnsConfig) -> Shape:
    if files[0].suffix.lower() == ".tar":
        return Shape(f"{len(files)} tar shard(s)", lambda: checked(data, tar.find(data, root, files, columns)))
    return Shape(f"{len(files)} Parquet file(s)", lambda: checked(data, parquet.find(data, root, files, columns)))


def _refuse_compressed(data: Path, files: list[Path]) -> None:
    compressed = next((file for file in files if file.name.lower().endswith(tar.COMPRESSED) and file.exists()), None)
    if compressed is not None:
        reason = f"{compressed.name} is compressed, so that no image of it can be read without all before it"
        raise UserError("--data", data, reason, "uncompress it to a .tar; photographs are compressed already")
