"""Batches on the device, decoded ahead of time: endless and balanced for training, each image once for evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpcn_dist.data.ahead import FetchedAhead
from fpcn_dist.data.batch import Batch, BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.backends import Decoding, open_backend
from fpcn_dist.data.decoding.pieces import Pieces
from fpcn_dist.data.index.check.checking import check_blobs
from fpcn_dist.data.index.check.salvage import salvage
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.mixing import check_pairs, mix, mixture
from fpcn_dist.data.remote.reading import bound_cache
from fpcn_dist.data.sampler import (
    BalancedSampler,
    WholeSampler,
    check_composition,
    check_division,
    check_whole_division,
    share,
    substitutes,
)
from fpcn_dist.data.views import VIEW, Views, centre_views, crops, views
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.cores import usable_cores
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.launchers import told
from fpcn_dist.runtime.limits import MIB

Ids = NDArray[np.int64]
SoftLabels = Callable[[Ids, Ids], NDArray[np.float32]]
"""A teacher's logits [B, K] of the views that B image ids and view numbers name."""


class Replacement(NamedTuple):
    """An image that turned unreadable during the run, and in whose place others of its class are shown."""

    image_id: int
    path: str
    reason: str


class _Plan(NamedTuple):
    """A rank's share of a batch before it is decoded; columns as in :class:`Batch`."""

    blobs: list[Blob]
    labels: Ids
    image_ids: Ids
    view_ids: Ids
    views: Views

    @property
    def request(self) -> BatchRequest:
        return BatchRequest(self.blobs, self.views)

    def batch(self, images: Tensor, device: torch.device, soft_labels: SoftLabels | None = None) -> Batch:
        columns: list[NDArray] = [self.labels, self.image_ids, self.view_ids, crops(self.views)]
        if soft_labels is not None:
            columns.append(soft_labels(self.image_ids, self.view_ids))
        return Batch(images, *(torch.from_numpy(column).to(device, non_blocking=True) for column in columns))


def _faults(plans: Iterable[_Plan], config: DataConfig) -> dict[int, Replacement]:
    """Which of the images that are planned cannot be decoded now, by image id."""
    blob_of = {i: blob for plan in plans for i, blob in zip(plan.image_ids.tolist(), plan.blobs, strict=True)}
    blobs = list(blob_of.values())
    looked = dict(check_blobs(blobs, open_backend(config.backend).decoder, config.max_pixels))
    checks = [looked[index] for index in range(len(blobs))]
    if config.on_bad_image == "salvage":
        checks, _ = salvage(blobs, checks, config.max_pixels)
    found = zip(blob_of, blobs, checks, strict=True)
    return {i: Replacement(i, str(blob), check.reason) for i, blob, check in sorted(found) if check.reason is not None}


def _decode(requests: Iterator[BatchRequest], config: DataConfig, device: torch.device, batch_size: int) -> Decoding:
    """Begin to decode, in pieces that the config's memory holds, with its CPU threads, or this rank's share of the
    cores that it may run on."""
    ranks_here = told("LOCAL_WORLD_SIZE", 1)
    threads = config.threads or max(1, usable_cores() // ranks_here)
    bound_cache(config.cache_gib)
    backend = open_backend(config.backend)
    bound = config.max_decoded_mib * MIB // backend.decodes_at_once

    def in_pieces(ahead: Iterator[BatchRequest]) -> Decoding:
        return Pieces(ahead, lambda pieces: backend.decoding(pieces, config, device, batch_size, threads), bound)

    return FetchedAhead(requests, in_pieces)


class TrainLoader:
    """This rank's share of an endless sequence of class-balanced global batches, starting at any step.

    Batch k is a function of (manifest, config, seed, k, rank, world size) alone: the same bits after a restart and with
    any number of threads, and joined over the ranks the same global batch for any number of ranks.

    A file that turns unreadable during the run is replaced, wherever it is due, by another training image of its class
    that the global batch does not hold yet, which (seed, image id, step) choose; the batch names the image that it
    really shows. Two such replacements in one batch may coincide. A process started anew replaces the file alike.

    Args:
        manifest: the images.
        config: sizes, composition of a batch, threads.
        seed: key of batches and views.
        rank, world_size: which share of each global batch is decoded.
        device: where the images are decoded and end up.
        start_step: step of the first batch.
        soft_labels: where the batches' teacher logits come from, if they have any.

    Attributes:
        batch_size: images of the *global* batch.
        steps_per_epoch: training images // batch_size, at least 1.
        images_from: the first step whose images are decoded; the batches before it have none. Set it before iterating.
        replaced: the files of this rank's batches that turned unreadable so far.

    Raises:
        UserError: the data or the number of ranks do not fit the batch, or its mixing; while iterating, more than
            ``max_bad_images`` files of this rank turned unreadable, or all images of a class did.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        seed: int,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        start_step: int = 0,
        soft_labels: SoftLabels | None = None,
    ) -> None:
        self._manifest, self._config, self._seed = manifest, config, seed
        self._soft_labels = soft_labels
        self._rank, self._world_size, self._device = rank, world_size, device
        train_ids, self._labels = manifest.ids("train"), manifest.labels
        self._ids_of_class = [train_ids[self._labels[train_ids] == label] for label in range(len(manifest.classes))]
        self._sampler = self._build_sampler(train_ids, world_size)
        self.batch_size = self._sampler.batch_size
        check_pairs(self.batch_size, world_size, config.augment)
        self.steps_per_epoch = max(1, len(train_ids) // self.batch_size)
        self._unreadable: dict[int, Replacement] = {}
        self._planned: deque[_Plan] = deque()
        self._step, self._retried_step = start_step, -1
        self.images_from = start_step
        self._decoding: Decoding | None = None

    def _build_sampler(self, train_ids: Ids, world_size: int) -> BalancedSampler | WholeSampler:
        if self._config.images_per_class is None:
            check_composition(self._manifest.classes, list(map(len, self._ids_of_class)), self._config)
            check_whole_division(len(train_ids), world_size)
            return WholeSampler(train_ids, len(self._ids_of_class), self._seed)
        balanced = BalancedSampler(self._manifest.classes, self._ids_of_class, self._config, self._seed)
        check_division(balanced.classes_per_batch, balanced.images_per_class, world_size)
        return balanced

    @property
    def replaced(self) -> list[Replacement]:
        return list(self._unreadable.values())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._step < self.images_from:
            plan, self._step = self._plan(self._step, decoded=False), self._step + 1
            return plan.batch(
                torch.empty(len(plan.labels), 3, 0, 0, device=self._device), self._device, self._soft_labels
            )
        while True:
            self._decoding = self._decoding or self._decode()
            try:
                images = self._decoding.next()
            except RuntimeError as error:
                self._leave_out_unreadable(error)
                self._decoding.close()
                self._decoding = None
                continue
            batch = self._planned.popleft().batch(images, self._device, self._soft_labels)
            how = mixture(self._seed, self._step, self._config.crop, self._config.augment)
            self._step += 1
            if how is None:
                return batch
            images, targets = mix(images, batch.labels, len(self._manifest.classes), how)
            return dataclasses.replace(batch, images=images, targets=targets)

    def close(self) -> None:
        """Stop decoding ahead and free its buffers."""
        if self._decoding is not None:
            self._decoding.close()

    def _decode(self) -> Decoding:
        """Decode from the next step on."""
        self._planned.clear()
        size = self.batch_size // self._world_size
        return _decode(self._requests(self._step), self._config, self._device, size)

    def _requests(self, step: int) -> Iterator[BatchRequest]:
        while True:
            plan = self._plan(step)
            self._planned.append(plan)
            yield plan.request
            step += 1

    def _plan(self, step: int, *, decoded: bool = True) -> _Plan:
        """This rank's share of a step; without blobs and crops where nothing is decoded."""
        batch_ids, batch_views = self._sampler.batch(step)
        if self._config.views is not None:
            batch_views = batch_views % self._config.views
        image_ids, view_ids = (share(column, self._rank, self._world_size) for column in (batch_ids, batch_views))
        image_ids = np.array([self._readable(i, step, batch_ids) for i in image_ids.tolist()], dtype=np.int64)
        labels = self._labels[image_ids]
        if not decoded:
            return _Plan([], labels, image_ids, view_ids, np.zeros(len(labels), VIEW))
        blobs = [self._manifest.blob(image_id) for image_id in image_ids.tolist()]
        shown = views(self._seed, image_ids, view_ids, self._config)
        return _Plan(blobs, labels, image_ids, view_ids, shown)

    def _readable(self, image_id: int, step: int, batch_ids: Ids) -> int:
        """The image itself, or what stands in for it where it is known to be unreadable."""
        if image_id not in self._unreadable:
            return image_id
        label = self._labels[image_id]
        candidates = np.setdiff1d(self._ids_of_class[label], list(self._unreadable))
        if not candidates.size:
            reason = f"all training images of class {self._manifest.classes[label]!r} turned unreadable during the run"
            raise UserError("--data", self._manifest.root, reason, "restore them and start the same command again")
        unused = np.setdiff1d(candidates, batch_ids)
        return int(substitutes(self._seed, image_id, step, unused if unused.size else candidates)[0])

    def _leave_out_unreadable(self, error: RuntimeError) -> None:
        """Find out which files stopped the pipeline; where all are readable now, let the step be tried once more."""
        found = _faults(self._planned, self._config)
        if not found and self._retried_step == self._step:
            raise error
        self._retried_step = self._step
        self._unreadable |= found
        if len(self._unreadable) > self._config.max_bad_images:
            shown = "; ".join(f"{path}: {reason}" for _, path, reason in self._unreadable.values())
            reason = f"{len(self._unreadable)} files turned unreadable during the run ({shown})"
            hint = "restore them and start the same command again, or raise data.max_bad_images"
            raise UserError("data.max_bad_images", self._config.max_bad_images, reason, hint) from error


class EvalLoader:
    """Every image exactly once across the ranks, in its central crop; for evaluation and for prediction on any files.

    Rank r takes images r, r + world_size, ... in order; shares may be uneven or empty and last batches short. View
    numbers are -1: the central crop is none of the training views. It can be iterated any number of times.

    Args:
        blobs: N encoded images.
        labels: [N] class indices, -1 where unknown.
        image_ids: [N] ids that the batches carry.
        config: sizes, images per batch, threads.
        rank, world_size: which share is decoded.
        device: where the images are decoded and end up.

    Raises:
        UserError: while iterating, a file is unreadable. It is not replaced or left out: an accuracy over other images
            than the ones asked for would be wrong without showing it.
    """

    def __init__(
        self,
        blobs: Sequence[Blob],
        labels: Ids,
        image_ids: Ids,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        mine = slice(rank, None, world_size)
        self._blobs = list(blobs[mine])
        self._labels, self._image_ids = np.asarray(labels)[mine], np.asarray(image_ids)[mine]
        self._config, self._device = config, device

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, split: str, config: DataConfig, *, rank: int, world_size: int, device: torch.device
    ) -> EvalLoader:
        """The images of a split."""
        ids = manifest.ids(split)
        blobs = [manifest.blob(image_id) for image_id in ids.tolist()]
        return cls(blobs, manifest.labels[ids], ids, config, rank=rank, world_size=world_size, device=device)

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._blobs) // self._config.eval_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        size = min(self._config.eval_batch_size, len(self._blobs))
        plans = [self._plan(slice(i * size, (i + 1) * size)) for i in range(len(self))]
        if not plans:
            return
        requests = iter([plan.request for plan in plans])
        decoding = _decode(requests, self._config, self._device, size)
        with contextlib.closing(decoding):
            for plan in plans:
                try:
                    images = decoding.next()
                except RuntimeError as error:
                    self._explain(plan, error)
                yield plan.batch(images, self._device)

    def _plan(self, part: slice) -> _Plan:
        blobs, labels, image_ids = self._blobs[part], self._labels[part], self._image_ids[part]
        return _Plan(blobs, labels, image_ids, np.full(len(blobs), -1), centre_views(len(blobs)))

    def _explain(self, plan: _Plan, error: RuntimeError) -> NoReturn:
        for _, path, reason in _faults([plan], self._config).values():
            raise UserError("image", path, reason, "restore it, or leave it out and evaluate anew") from error
        raise error


class ViewLoader(EvalLoader):
    """Training views in a given order, each once, in batches of ``eval_batch_size``; for a teacher to look at.

    Args:
        manifest: the images.
        config: sizes, images per batch, threads.
        seed: key of the views.
        image_ids, view_ids: [N] which views.
        device: where the images are decoded and end up.

    Raises:
        UserError: while iterating, a file is unreadable.
    """

    def __init__(
        self, manifest: Manifest, config: DataConfig, seed: int, image_ids: Ids, view_ids: Ids, device: torch.device
    ) -> None:
        blobs = [manifest.blob(image_id) for image_id in image_ids.tolist()]
        labels = manifest.labels[image_ids]
        super().__init__(blobs, labels, image_ids, config, rank=0, world_size=1, device=device)
        self._seed, self._view_ids = seed, view_ids

    def _plan(self, part: slice) -> _Plan:
        blobs, labels, image_ids = self._blobs[part], self._labels[part], self._image_ids[part]
        view_ids = self._view_ids[part]
        return _Plan(blobs, labels, image_ids, view_ids, views(self._seed, image_ids, view_ids, self._config))
