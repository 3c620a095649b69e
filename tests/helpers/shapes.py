"""Writes the photographs of a folder in other shapes: a table, tar shards, Parquet files."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def photographs(folder: Path) -> list[tuple[str, str]]:
    """Path relative to a folder, and class, of each of its photographs, sorted."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.jpg"))
    return [(path.as_posix(), path.parent.name) for path in paths]


def write_table(file: Path, rows: Sequence[tuple[str, ...]], header: Sequence[str] = ("path", "label")) -> Path:
    """Write a CSV."""
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def write_tar(shard: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar file of named bytes."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return shard


def examples(folder: Path, rows: Sequence[tuple[str, str]]) -> list[tuple[str, bytes]]:
    """The photographs with their labels as WebDataset has them: ``x.jpg`` and ``x.cls``."""
    members = []
    for path, label in rows:
        members += [(path, (folder / path).read_bytes()), (path.rpartition(".")[0] + ".cls", label.encode())]
    return members


def write_parquet(
    file: Path, folder: Path, rows: Sequence[tuple[str, str]], names: Sequence[str] | None = None, **options: Any
) -> Path:
    """Write photographs and labels as Hugging Face does; with ``names``, labels are numbers."""
    images = [{"bytes": (folder / path).read_bytes(), "path": path} for path, _ in rows]
    labels: list[Any] = [label if names is None else names.index(label) for _, label in rows]
    table = pa.table({"image": pa.array(images, IMAGES), "label": labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, **options)
    return file


def as_csv(rocks: Path, folder: Path) -> Path:
    """A table beside the class folders; gives what ``--data`` is to name, as the next ones do."""
    shutil.copytree(rocks, folder, dirs_exist_ok=True)
    return write_table(folder / "labels.csv", photographs(rocks))


def as_metadata(rocks: Path, folder: Path) -> Path:
    """The same with Hugging Face's table."""
    shutil.copytree(rocks, folder, dirs_exist_ok=True)
    write_table(folder / "metadata.csv", photographs(rocks), ("file_name", "label"))
    return folder


def as_tar(rocks: Path, folder: Path) -> Path:
    """Three shards."""
    rows = photographs(rocks)
    for index in range(3):
        write_tar(folder / f"rocks-{index:03d}.tar", examples(rocks, rows[index::3]))
    return folder


def as_parquet(rocks: Path, folder: Path) -> Path:
    """Two files with several row groups of several pages, whose labels are numbers."""
    rows, names = photographs(rocks), ("marble", "basalt", "dolomite")
    for index in range(2):
        file = folder / f"data-{index:05d}-of-00002.parquet"
        write_parquet(file, rocks, rows[index::2], names, row_group_size=20, data_page_size=20_000)
    return folder


SHAPES = {"csv": as_csv, "metadata": as_metadata, "tar": as_tar, "parquet": as_parquet}
