"""The same photographs as files, tar shards and Parquet files; who else reads these; what their bytes alone cost."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.shapes.recognise import recognise
from fpcn_dist.recipe.schema import DataConfig

_FILES = 8
"""Shards, and Parquet files."""
_ROWS = 100
"""Rows of a row group, as Hugging Face writes images."""
_BUFFER = 1000
"""Images in the buffers in which others shuffle."""

Load = Callable[[bytes], Tensor]


class Stored(NamedTuple):
    """Photographs in three shapes.

    Attributes:
        files: one file each.
        shards: tar files of these.
        parquet: Parquet files of these, compressed with Snappy as is usual.
    """

    files: list[Path]
    shards: list[Path]
    parquet: list[Path]

    @classmethod
    def write(cls, paths: Sequence[str], folder: Path) -> Stored:
        """Copy photographs into a folder, in each shape."""
        for name in ("files", "shards", "parquet"):
            (folder / name).mkdir()
        stored = cls(
            [folder / "files" / f"{index:06d}.jpg" for index in range(len(paths))],
            [folder / "shards" / f"{index:06d}.tar" for index in range(_FILES)],
            [folder / "parquet" / f"data-{index:05d}-of-{_FILES:05d}.parquet" for index in range(_FILES)],
        )
        for source, file in zip(paths, stored.files, strict=True):
            file.write_bytes(Path(source).read_bytes())
        for index, (shard, table) in enumerate(zip(stored.shards, stored.parquet, strict=True)):
            part = stored.files[index::_FILES]
            _write_tar(shard, part)
            _write_parquet(table, part)
        os.sync()
        return stored

    def blobs(self, config: DataConfig) -> dict[str, list[Blob]]:
        """Where the images lie in each shape, in their order there."""
        found = {"files": Blob.of_files(self.files)}
        for name, files in (("tar", self.shards), ("Parquet", self.parquet)):
            folder = files[0].parent
            candidates = recognise(folder, config.columns).find().candidates
            found[name] = [Blob.within(str(folder), c.path, c.place) for c in candidates]
        return found


def _write_tar(shard: Path, files: Sequence[Path]) -> None:
    with tarfile.open(shard, "w") as tar:
        for file in files:
            for name, data in ((file.name, file.read_bytes()), (f"{file.stem}.cls", _label(file).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _write_parquet(table: Path, files: Sequence[Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": file.read_bytes(), "path": file.name} for file in files], kind)
    pq.write_table(pa.table({"image": images, "label": list(map(_label, files))}), table, row_group_size=_ROWS)


def _label(file: Path) -> str:
    return str(int(file.stem) // _FILES % 2)


_T = TypeVar("_T")


class Made(Dataset[_T]):
    """What a function makes of files, by their index."""

    def __init__(self, files: Sequence[Any], make: Callable[[Any], _T]) -> None:
        self._files, self._make = files, make

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> _T:
        return self._make(self._files[index])


def others(stored: Stored, load: Load, batch_size: int, workers: int) -> dict[str, Iterable[Tensor]]:
    """Batches of all photographs as others read them, in shuffled order; workers live on from epoch to epoch.

    Args:
        stored: the photographs.
        load: makes a view of an encoded image.
        batch_size: images of a batch.
        workers: processes.
    """
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import datasets
    import webdataset

    def loader(rows: Dataset[Any] | IterableDataset[Any], of_row: Callable[[Any], Tensor]) -> DataLoader[Any]:
        return DataLoader(
            rows,
            batch_size,
            shuffle=None if isinstance(rows, IterableDataset) else True,
            num_workers=workers,
            persistent_workers=True,
            multiprocessing_context="fork",
            collate_fn=lambda batch: torch.stack([of_row(row) for row in batch]),
        )

    shards = webdataset.WebDataset(  # pyright: ignore[reportAttributeAccessIssue]
        list(map(str, stored.shards)), shardshuffle=_FILES, empty_check=False
    )
    files = {"data_files": list(map(str, stored.parquet)), "split": "train"}
    table: Any = datasets.load_dataset("parquet", cache_dir=str(stored.parquet[0].parents[1] / "arrow"), **files)
    stream: Any = datasets.load_dataset("parquet", streaming=True, **files)
    return {
        "torchvision DataLoader, files": loader(Made(stored.files, Path.read_bytes), load),
        "WebDataset, tar, in order": loader(shards.shuffle(_BUFFER), lambda row: load(row["jpg"])),
        "datasets, Parquet unpacked to Arrow": loader(table, lambda row: load(row["image"]["bytes"])),
        "datasets, Parquet streamed, in order": loader(
            stream.shuffle(seed=0, buffer_size=_BUFFER), lambda row: load(row["image"]["bytes"])
        ),
    }


def reading(shapes: dict[str, list[Blob]], threads: int, repeats: int) -> Table:
    """Read all images of each shape in order and at random, with nothing of them in the page cache."""
    table = Table(
        "stored as", "order", "images/s", "MB/s", "range", title=f"bytes alone, from the disk, {threads} thread(s)"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for name, blobs in shapes.items():
        drawn = [blobs[i] for i in np.random.default_rng(0).permutation(len(blobs))]
        for order, ordered in (("in order", blobs), ("at random", drawn)):
            rates = sorted(_read(ordered, threads) for _ in range(repeats))
            images, megabytes = rates[len(rates) // 2]
            table.add_row(name, order, f"{images:.0f}", f"{megabytes:.0f}", f"{rates[0][1]:.0f} - {rates[-1][1]:.0f}")
    return table


def _read(blobs: Sequence[Blob], threads: int) -> tuple[float, float]:
    """Images and megabytes of images per second."""
    for path in {blob.path for blob in blobs}:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        size = sum(pool.map(lambda blob: len(blob.read()), blobs))
    seconds = time.perf_counter() - begin
    return len(blobs) / seconds, size / 1e6 / seconds
