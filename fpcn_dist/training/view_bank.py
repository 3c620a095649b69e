"""A bank of rows, one for each view of an image, computed once by any number of processes and read from memory maps.

A view is a function of (seed, image, view number), so a bank can be computed ahead of training, in any order, and be
shared by whoever looks at the same views.

    bank.json     what the rows are of: all that they depend on
    <rows>.f32    [images, views, width] float32
    written       a byte for each chunk of views, 1 once its rows are on the disk
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.recipe.data import DataConfig
from fpcn_dist.runtime.errors import Outage, UserError
from fpcn_dist.runtime.files import write_text
from fpcn_dist.runtime.names import printable

META, WRITTEN = "bank.json", "written"
_PATIENCE = 1800.0
"""Seconds that a chunk may take another rank: far longer than ranks wait for one another elsewhere."""

Ids = NDArray[np.int64]


class ViewBank(ABC):
    """A bank in a folder: prepare it, write a share of it, wait for the others, look rows up.

    Args:
        folder: where it lies.
        key: all that the rows depend on, by name; a bank with another key is refused, naming what differs.
        ids: the images, in the order of their rows.
        views: views of each image.
        width: numbers of a row.
        chunk: views that are computed at once in a new bank.
    """

    ROWS: ClassVar[str]
    """Name of the file of the rows."""
    TITLE: ClassVar[str]
    """What such a bank is called."""
    CONTENT: ClassVar[str]
    """What its rows are called."""
    FIELD: ClassVar[str]
    """The recipe field that says where it lies."""

    def __init__(self, folder: Path, key: dict[str, Any], ids: Ids, *, views: int, width: int, chunk: int) -> None:
        self.folder, self.key, self.ids, self.views = folder, key, ids, views
        self._width, self._chunk = width, chunk

    @abstractmethod
    def loader(self, image_ids: Ids, view_ids: Ids, size: int, device: torch.device) -> Iterable[Batch]:
        """These views in batches of ``size``."""

    @property
    def width(self) -> int:
        return self._width

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.ids), self.views, self.width

    @functools.cached_property
    def chunk(self) -> int:
        """Views that are computed at once: as many as whoever prepared the bank has decided."""
        return read_description(self.folder)["chunk"]

    @property
    def chunks(self) -> int:
        return -(-len(self.ids) * self.views // self.chunk)

    @property
    def size(self) -> int:
        """Bytes of the rows."""
        return 4 * len(self.ids) * self.views * self.width

    def prepare(self) -> None:
        """Take the bank in the folder, whole or in part, or begin a new and empty one.

        For one process, before any other opens it. The space of a new bank is claimed at once, so that a disk that is
        too full is found before anything is computed.

        Raises:
            UserError: the folder holds the bank of something else (all that differs is named), or cannot be written to.
        """
        if (self.folder / META).is_file():
            self._require_same()
            return
        images, views, width = self.shape
        shown = f"{images} images x {views} views x {width} {self.CONTENT}, {self.size / 2**20:.1f} MiB"
        print(f"{self.TITLE} {printable(self.folder)}: {shown}", flush=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _claim(self.folder / self.ROWS, self.size)
            _claim(self.folder / WRITTEN, -(-images * views // self._chunk))
            # Last: with it the bank exists.
            meta = json.dumps({**self.key, "chunk": self._chunk}, indent=2)
            write_text(self.folder / META, meta + "\n")
        except (OSError, UserError) as error:
            with contextlib.suppress(OSError):
                for name in (self.ROWS, WRITTEN):
                    (self.folder / name).unlink(missing_ok=True)
            if isinstance(error, UserError):
                raise
            raise self._cannot_write(error) from error

    def missing(self) -> int:
        """Chunks that are not on the disk yet."""
        return self.chunks - np.count_nonzero(np.fromfile(self.folder / WRITTEN, dtype=np.uint8))

    def write(
        self, compute: Callable[[Tensor], Tensor], *, share: int, shares: int, device: torch.device, show: bool = False
    ) -> None:
        """Compute every ``shares``-th chunk from ``share`` on, less what is there already.

        Call it again after a kill, with the same or another number of shares. A chunk is marked as written after its
        rows have reached the disk.

        Args:
            compute: images [chunk, 3, H, W] to rows [chunk, width].
            share, shares: which chunks.
            device: where to compute.
            show: draw a line of progress.

        Raises:
            UserError: an image cannot be read, or the disk cannot be written to.
        """
        size, total = self.chunk, len(self.ids) * self.views
        written = np.fromfile(self.folder / WRITTEN, dtype=np.uint8)
        todo = [chunk for chunk in range(share, self.chunks, shares) if not written[chunk]]
        if not todo:
            return
        # The last chunk is filled up with the first views: rounding depends on the size of a batch.
        entry = np.concatenate([np.arange(chunk * size, (chunk + 1) * size) for chunk in todo]) % total
        loader = self.loader(self.ids[entry // self.views], entry % self.views, size, device)
        batches = track(loader, self.CONTENT, len(todo), console=Console(), transient=True, disable=not show)
        with self._open(self.ROWS) as rows, self._open(WRITTEN) as marks:
            for chunk, batch in zip(todo, batches, strict=True):
                values = compute(batch.images).float().cpu().numpy()[: total - chunk * size]
                try:
                    _write_at(rows.fileno(), values.tobytes(), chunk * size * values[0].nbytes)
                    os.fsync(rows.fileno())
                    _write_at(marks.fileno(), b"\1", chunk)
                except OSError as error:
                    raise self._cannot_write(error) from error

    def _open(self, name: str):
        return open(self.folder / name, "rb+")

    def wait(self) -> None:
        """Wait until all shares are written.

        Raises:
            UserError: none of the others has written anything for a long time.
        """
        missing, since = self.missing(), time.monotonic()
        while missing:
            time.sleep(0.2)
            if (now := self.missing()) < missing:
                missing, since = now, time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                reason = f"{missing} of its {self.chunks} chunks are missing, and nobody has written one for long"
                raise UserError("bank", self.folder, reason, "see the other ranks' messages; the same command goes on")

    @functools.cached_property
    def rows(self) -> NDArray[np.float32]:
        """[images, views, width], mapped into memory."""
        return np.memmap(self.folder / self.ROWS, dtype=np.float32, mode="r", shape=self.shape)

    @functools.cached_property
    def row_of(self) -> Ids:
        """[largest id + 1] the row of each image id, -1 where it has none."""
        row = np.full(self.ids.max() + 1, -1, dtype=np.int64)
        row[self.ids] = np.arange(len(self.ids))
        return row

    def _require_same(self) -> None:
        differences = list(self.differences(read_description(self.folder)))
        if differences:
            raise UserError(
                "bank",
                self.folder,
                f"holds the {self.CONTENT} of something else ({', '.join(differences)})",
                f"remove the folder, or choose another --output or {self.FIELD}",
            )
        for name, size in ((self.ROWS, self.size), (WRITTEN, self.chunks)):
            if not (self.folder / name).is_file() or (self.folder / name).stat().st_size != size:
                raise UserError("bank", self.folder / name, "is missing or has not its size", "remove the folder")

    def differences(self, found: dict[str, Any]) -> Iterator[str]:
        """What the description of a bank that was ``found`` has otherwise than this one."""
        found = DataConfig().pixels() | found  # what an older version did not know was as it is by default
        for name, value in self.key.items():
            if found.get(name) != value:
                yield f"{name} {_shown(found.get(name))} instead of {_shown(value)}"

    def _cannot_write(self, error: OSError) -> UserError:
        reason = f"cannot be written ({error.strerror or error})"
        hint = f"free some space there or choose another --output or {self.FIELD}"
        return Outage("bank", self.folder, reason, hint)


def _shown(value: Any) -> Any:
    """A value in a message: hashes are cut short, and JSON's lists are tuples."""
    return value[:16] if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _write_at(file: int, data: bytes, offset: int) -> None:
    """All of ``data``: the system may write less than it is asked to."""
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _claim(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        os.fsync(file.fileno())


def read_description(folder: Path) -> dict[str, Any]:
    """What the bank in ``folder`` says about itself.

    Raises:
        UserError: it is damaged, or there is none.
    """
    try:
        values = json.loads((folder / META).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("chunk"), int):
            raise ValueError("a field is missing")
        return values
    except (ValueError, OSError) as error:
        raise UserError("bank", folder / META, f"is not the description of a bank ({error})", "remove it") from None
