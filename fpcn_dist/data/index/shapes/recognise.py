"""Which shape the data at ``--data`` have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fpcn_dist.data.index import layout
from fpcn_dist.data.index.folders import is_image, list_folder
from fpcn_dist.data.index.layout import Found
from fpcn_dist.data.index.shapes import parquet, remote, table, tar
from fpcn_dist.data.index.shapes.found import checked
from fpcn_dist.data.index.strangers import find_strangers, is_inside
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
        return _of_folder(data, columns)
    files = list(map(Path, tar.expand(str(data)))) if "{" in data.name else [data]
    suffix = files[0].suffix.lower()
    if suffix in table.SUFFIXES and len(files) == 1 and data.exists():
        return _table(data.parent, data, [data], columns)
    if suffix in (".tar", ".parquet") and (data.exists() or len(files) > 1):
        return _files(data, data.parent, files, columns)
    _refuse_compressed(data, files)
    return Shape("a folder of images", lambda: layout.find(data))


def _of_folder(data: Path, columns: ColumnsConfig) -> Shape:
    listing = list_folder(data)
    images = Shape("a folder of images", lambda: layout.arrange(listing, data))
    if listing.unreadable:
        return images  # whose search says what cannot be read
    strangers = find_strangers(listing.folders, is_image)
    own = {folder: names for folder, names in listing.folders.items() if not is_inside(folder, strangers)}
    has_classes = sum(any(map(is_image, names)) for folder, names in own.items() if folder) > 1
    tables = table.find_metadata(data)
    if tables and (table.names_classes(tables[0], columns) or not has_classes):
        return _table(data, data, tables, columns)
    if not has_classes:
        near = {folder: names for folder, names in own.items() if len(Path(folder).parts) <= _DEPTH}
        below = sorted(data / folder / name for folder in near for name in near[folder] if not name.startswith("."))
        for suffix in (".tar", ".parquet"):
            if files := [file for file in below if file.suffix.lower() == suffix]:
                return _files(data, data, files, columns)
        _refuse_compressed(data, below)
    return images


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
