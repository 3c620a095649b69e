"""The soft-label bank: a teacher's raw logits of some views of each training image, computed once for every student.

A view is a function of (seed, image, view number), so a bank can be computed ahead of training, by any number of
processes, in any order, and be shared by whoever trains on the same views: every temperature, alpha, student and retry.

    bank.json     what the logits are of: data, teacher, views, arithmetic
    logits.f32    [training images, views, classes] float32, memory-mapped
    written       a byte for each chunk of views, 1 once its logits are on the disk
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from fpcn_dist.data.loader import ViewLoader
from fpcn_dist.data.manifest import Manifest
from fpcn_dist.recipe.augment import AugmentConfig
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.errors import Outage, UserError
from fpcn_dist.runtime.files import write_text
from fpcn_dist.training.soft_labels.teacher import Teacher

META, LOGITS, WRITTEN = "bank.json", "logits.f32", "written"
_FORMAT = 1
_PATIENCE = 1800.0
"""Seconds that a chunk may take another rank: far longer than ranks wait for one another elsewhere."""


@dataclass(frozen=True)
class BankKey:
    """All that logits depend on; a bank with another key is refused, naming what differs."""

    format: int
    manifest: str
    teacher: str
    seed: int
    views: int
    resize: int
    crop: int
    flip: bool
    fit: str
    augment: str
    precision: str

    @classmethod
    def of(cls, recipe: Recipe, manifest: Manifest) -> BankKey:
        data, teacher, views = recipe.data, recipe.distill.teacher_sha256, recipe.data.views
        assert teacher is not None and views is not None
        return cls(
            _FORMAT,
            manifest.hash,
            teacher,
            recipe.seed,
            views,
            data.resize,
            data.crop,
            data.flip,
            data.fit,
            _changes(data.augment),
            recipe.train.precision,
        )


def _changes(augment: AugmentConfig) -> str:
    """What views change, in the words of the recipe; "none" for nothing."""
    fields = augment.model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in sorted(fields.items())) or "none"


_EARLIER = {"fit": "squeeze", "augment": "none"}
"""What is true of a bank that was written before its description said so."""


class SoftLabelBank:
    """An open bank: write a share of it, wait for the others, look logits up.

    Args:
        folder: of :func:`prepare_bank`, which the first rank or the driver has called.
        recipe: whose seed, views and sizes the bank has.
        manifest: the images.
    """

    def __init__(self, folder: Path, recipe: Recipe, manifest: Manifest) -> None:
        self.folder, self.recipe, self.manifest = folder, recipe, manifest
        self.ids = manifest.ids("train")
        self.views = recipe.data.views or 0
        self.shape = (len(self.ids), self.views, len(manifest.classes))
        self.chunk: int = _read(folder)["chunk"]
        self._row = np.full(len(manifest.images), -1, dtype=np.int64)
        self._row[self.ids] = np.arange(len(self.ids))
        self._logits: NDArray[np.float32] | None = None

    @property
    def chunks(self) -> int:
        return -(-len(self.ids) * self.views // self.chunk)

    def missing(self) -> int:
        """Chunks that are not on the disk yet."""
        return self.chunks - np.count_nonzero(np.fromfile(self.folder / WRITTEN, dtype=np.uint8))

    def write(self, teacher: Teacher, *, share: int, shares: int, device: torch.device, show: bool = False) -> None:
        """Compute every ``shares``-th chunk from ``share`` on, less what is there already.

        Call it again after a kill, with the same or another number of shares. A chunk is marked as written after its
        logits have reached the disk.

        Raises:
            UserError: an image cannot be read, or the disk cannot be written to.
        """
        size, total = self.chunk, len(self.ids) * self.views
        written = np.fromfile(self.folder / WRITTEN, dtype=np.uint8)
        todo = [chunk for chunk in range(share, self.chunks, shares) if not written[chunk]]
        if not todo:
            return
        config = self.recipe.data.changed(eval_batch_size=size)
        # The last chunk is filled up with the first views: rounding depends on the size of a batch.
        entry = np.concatenate([np.arange(chunk * size, (chunk + 1) * size) for chunk in todo]) % total
        loader = ViewLoader(
            self.manifest, config, self.recipe.seed, self.ids[entry // self.views], entry % self.views, device
        )
        batches = track(loader, "soft labels", len(todo), console=Console(), transient=True, disable=not show)
        with self._open(LOGITS) as logits, self._open(WRITTEN) as marks:
            for chunk, batch in zip(todo, batches, strict=True):
                values = teacher(batch.images).float().cpu().numpy()[: total - chunk * size]
                try:
                    _write_at(logits.fileno(), values.tobytes(), chunk * size * values[0].nbytes)
                    os.fsync(logits.fileno())
                    _write_at(marks.fileno(), b"\1", chunk)
                except OSError as error:
                    raise _cannot_write(self.folder, error) from error

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

    def __call__(self, image_ids: NDArray[np.int64], view_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, K] of B views."""
        if self._logits is None:
            self._logits = np.memmap(self.folder / LOGITS, dtype=np.float32, mode="r", shape=self.shape)
        return np.asarray(self._logits[self._row[image_ids], view_ids])


def prepare_bank(folder: Path, recipe: Recipe, manifest: Manifest) -> SoftLabelBank:
    """The bank in ``folder``: the one that is there, whole or in part, or a new and empty one.

    For one process, before any other opens it. The space of a new bank is claimed at once, so that a disk that is too
    full is found before the teacher computes.

    Raises:
        UserError: the folder holds the bank of something else (all that differs is named), or cannot be written to.
    """
    key = BankKey.of(recipe, manifest)
    if (folder / META).is_file():
        _require_same(folder, key)
        bank = SoftLabelBank(folder, recipe, manifest)
        for name, size in ((LOGITS, _bytes(bank)), (WRITTEN, bank.chunks)):
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise UserError("bank", folder / name, "is missing or has not its size", "remove the folder")
        return bank
    images, classes, views = len(manifest.ids("train")), len(manifest.classes), key.views
    # As many views as a batch of one rank has: the teacher then rounds as it does in that rank's steps.
    chunk = recipe.data.batch_size(classes)
    size = 4 * images * views * classes
    shown = f"{images} images x {views} views x {classes} classes, {size / 2**20:.1f} MiB"
    print(f"soft-label bank {folder}: {shown}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder / LOGITS, size)
        _claim(folder / WRITTEN, -(-images * views // chunk))
        # Last: with it the bank exists.
        write_text(folder / META, json.dumps({**dataclasses.asdict(key), "chunk": chunk}, indent=2) + "\n")
    except (OSError, UserError) as error:
        with contextlib.suppress(OSError):
            for name in (LOGITS, WRITTEN):
                (folder / name).unlink(missing_ok=True)
        if isinstance(error, UserError):
            raise
        raise _cannot_write(folder, error) from error
    return SoftLabelBank(folder, recipe, manifest)


def _bytes(bank: SoftLabelBank) -> int:
    images, views, classes = bank.shape
    return 4 * images * views * classes


def _write_at(file: int, data: bytes, offset: int) -> None:
    """All of ``data``: the system may write less than it is asked to."""
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _claim(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        os.fsync(file.fileno())


def _cannot_write(folder: Path, error: OSError) -> UserError:
    reason = f"cannot be written ({error.strerror or error})"
    return Outage("bank", folder, reason, "free some space there or choose another --output or distill.bank")


def _require_same(folder: Path, key: BankKey) -> None:
    differences = list(_differences(_EARLIER | _read(folder), dataclasses.asdict(key)))
    if differences:
        raise UserError(
            "bank",
            folder,
            f"holds the logits of something else ({', '.join(differences)})",
            "remove the folder, or choose another --output or distill.bank",
        )


def _read(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / META).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("chunk"), int):
            raise ValueError("a field is missing")
        return values
    except (ValueError, OSError) as error:
        raise UserError("bank", folder / META, f"is not the description of a bank ({error})", "remove it") from None


def _differences(found: dict, wanted: dict) -> Iterator[str]:
    for name, value in wanted.items():
        if found.get(name) != value:
            before, now = (str(v)[:64] if name == "augment" else str(v)[:16] for v in (found.get(name), value))
            yield f"{name} {before} instead of {now}"
