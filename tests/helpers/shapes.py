"""Writes the photographs of a folder in other shapes: a table, tar shards, Parquet files."""

from __future__ import annotations

import csv
import io
import json
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
