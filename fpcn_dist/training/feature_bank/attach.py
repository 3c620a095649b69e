"""Whether the features of a run are computed once, and the banks where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.models import FPCN
from fpcn_dist.recipe.schema import ModelConfig, Recipe
from fpcn_dist.runtime.errors import Outage, UserError
from fpcn_dist.runtime.products import default_matmul, multiplying
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.tasks import Task
from fpcn_dist.training.feature_bank.bank import FeatureBank
from fpcn_dist.training.feature_bank.encoder import Encoder, weights_hash
from fpcn_dist.training.schedule import Schedule


class StoredFeatures:
    """The features of a run's images, for as long as its backbone is frozen.

    Args:
        train: the bank of the training views.
        val: that of the validation images, if there are any.
        region: what the run pools.
        ranks: this process among all.
        eval_batch_size: validation images that are classified at once.
    """

    def __init__(
        self, train: FeatureBank, val: FeatureBank | None, region: str, ranks: Ranks, eval_batch_size: int
    ) -> None:
        self._train = train.open(region, ranks.device)
        self._val = None if val is None else val.open(region, ranks.device)
        self._size = eval_batch_size
        if val is not None:
            ids = torch.from_numpy(val.ids[ranks.rank :: ranks.world_size].copy())
            self._val_ids = ids.to(ranks.device)
            self._val_labels = torch.from_numpy(val.manifest.labels).to(ranks.device)[self._val_ids]

    def added_to(self, batch: Batch) -> Tensor:
        """The features [B, C] of a batch's views."""
        return self._train(batch.image_ids, batch.view_ids)

    def validation(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's validation images in batches: features [B, C], shares of the map inside the region, labels."""
        assert self._val is not None
        for ids, labels in zip(self._val_ids.split(self._size), self._val_labels.split(self._size), strict=True):
            yield *self._val.with_share(ids, torch.zeros_like(ids)), labels


def attach_features(
    recipe: Recipe, task: Task, manifest: Manifest, ranks: Ranks, schedule: Schedule, run: Path, *, step: int
) -> StoredFeatures | None:
    """The features of a run whose backbone is frozen at ``step``, computed first where they are not there yet; ``None``
    where they are computed in every step: they have to be, or no view is shown often enough. Collective.

    Raises:
        UserError: see :meth:`FeatureBank.prepare`; or the recipe names a bank, and the run cannot use any.
    """
    wanted = recipe.train.feature_bank
    if wanted is False:
        return None
    obstacle = _obstacle(recipe, task, manifest, schedule)
    if obstacle is not None:
        if wanted is True:
            return None
        raise UserError("train.feature_bank", wanted, obstacle, "drop it, or set it to true, which decides itself")
    if step >= schedule.frozen:
        return None
    folder = Path(wanted) if isinstance(wanted, str) else run / "features"
    part = schedule.batch_size // ranks.world_size // recipe.train.micro_batches
    banks = build_banks(folder, recipe, task, manifest, chunk=min(part, recipe.data.eval_batch_size))

    def prepare() -> bool:
        try:
            for bank in banks:
                bank.prepare()
        except Outage as error:
            if wanted is not True:
                raise
            print(f"warning: {error}; features are computed in every step", flush=True)
            return False
        return True

    if not ranks.on_first(prepare):
        return None
    for bank in banks:
        write_share(bank, recipe, task, None, ranks.rank, ranks.world_size, ranks.device, show=ranks.first)
    for bank in banks:
        bank.wait()
    return StoredFeatures(banks[0], next(iter(banks[1:]), None), task.model.region, ranks, recipe.data.eval_batch_size)


def _obstacle(recipe: Recipe, task: Task, manifest: Manifest, schedule: Schedule) -> str | None:
    """Why the features of this run are not, or not worth being, computed once."""
    views, augment = recipe.data.distinct_views, recipe.data.augment
    if not schedule.frozen:
        return "the backbone learns from the first step on"
    if not task.encodes_views:
        return f"what task {recipe.task!r} computes of an image differs from step to step"
    if augment.mixes or augment.region != "none":
        return "data.augment lets an image look otherwise at each visit, whatever its view"
    if views is None:
        return "each view of an image is a new one (data.views is null)"
    if recipe.train.feature_bank is True and schedule.frozen * schedule.batch_size <= views * len(
        manifest.ids("train")
    ):
        return "no view is shown twice while the backbone is frozen"
    return None


def build_banks(
    folder: Path,
    recipe: Recipe,
    task: Task,
    manifest: Manifest,
    *,
    chunk: int,
    regions: Sequence[ModelConfig] | None = None,
) -> list[FeatureBank]:
    """The bank of the training views and, where there are any, that of the validation images.

    Args:
        folder: of both.
        recipe, manifest: see :class:`FeatureBank`.
        task: the network, on any device.
        chunk: training views that are computed at once in a new bank.
        regions: what to pool; ``None``: what the network pools.
    """
    encoder = _encoder(recipe, task, regions)
    weights, size = weights_hash(task.model.backbone), recipe.data.eval_batch_size
    return [
        FeatureBank(
            folder / split,
            recipe,
            manifest,
            split,
            weights=weights,
            regions=encoder.regions,
            channels=encoder.channels,
            chunk=min(chunk if split == "train" else size, len(manifest.ids(split))),
        )
        for split in ("train", "val")
        if len(manifest.ids(split))
    ]


def write_share(
    bank: FeatureBank,
    recipe: Recipe,
    task: Task,
    regions: Sequence[ModelConfig] | None,
    share: int,
    shares: int,
    device: torch.device,
    *,
    show: bool = False,
) -> None:
    """Write a share of a bank of :func:`build_banks` with the arithmetic of a training step, or of an evaluation."""
    training = bank.split == "train"
    encoder = _encoder(recipe, task, regions, channels_last=training and recipe.train.channels_last)
    config = recipe.train
    matmul = config.matmul or default_matmul(config.precision, device)
    with multiplying(matmul if training else "highest"):
        bank.write(encoder, share=share, shares=shares, device=device, show=show)


def _encoder(
    recipe: Recipe, task: Task, regions: Sequence[ModelConfig] | None, *, channels_last: bool = False
) -> Encoder:
    if regions is None and isinstance(task.model, FPCN):
        regions = [task.model.config]
    return Encoder(task.model, regions, precision=recipe.train.precision, channels_last=channels_last)
