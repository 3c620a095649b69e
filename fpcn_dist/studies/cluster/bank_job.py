"""Banks of soft labels and of features, written by all places of a cluster at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.models import FPCN
from fpcn_dist.recipe.schema import ModelConfig, Recipe
from fpcn_dist.runtime.ranks import own_device, use_threads
from fpcn_dist.studies.cluster import Slots, task_result
from fpcn_dist.studies.cluster.ranks import write_output_to
from fpcn_dist.tasks import Task, build_task
from fpcn_dist.training.feature_bank.attach import build_banks, write_share
from fpcn_dist.training.feature_bank.bank import FeatureBank
from fpcn_dist.training.pretrained import name_preprocessing
from fpcn_dist.training.soft_labels.bank import SoftLabelBank, prepare_bank
from fpcn_dist.training.soft_labels.teacher import open_teacher
from fpcn_dist.training.view_bank import ViewBank

_ATTEMPTS = 3
"""How often the process of a share may be lost."""


def write_bank(ray: Any, slots: Slots, recipe: Recipe, manifest: Manifest, output: Path) -> None:
    """Complete the bank that ``recipe`` names, each place of the cluster writing a share.

    Args:
        ray: the module, connected.
        slots: the places.
        recipe: the recipe of a student, with its teacher.
        manifest: the images, which lie in ``output``/manifest.json, too.
        output: folder for manifest.json and logs/.

    Raises:
        UserError: see :func:`prepare_bank` and :func:`open_teacher`.
    """
    assert recipe.distill.bank is not None
    bank = prepare_bank(Path(recipe.distill.bank), recipe, manifest)
    if not bank.missing():
        return
    recipe = recipe.changed(**{"data.threads": max(1, slots.cpus)})
    common = recipe.model_dump(), str(bank.folder), str(output / "manifest.json")
    _complete(ray, slots, bank, "soft labels", _write_share, common, output)


def write_features(
    ray: Any, slots: Slots, recipe: Recipe, manifest: Manifest, output: Path, regions: Sequence[ModelConfig]
) -> None:
    """Complete the feature banks in the folder that ``recipe`` names, each place of the cluster writing a share.

    Args:
        ray, slots, manifest, output: see :func:`write_bank`.
        recipe: with a frozen backbone.
        regions: those to pool in, all of them at one pass of the backbone.

    Raises:
        UserError: see :meth:`FeatureBank.prepare`.
    """
    # The images are shown as the trials will settle it.
    recipe = name_preprocessing(recipe).changed(**{"data.threads": max(1, slots.cpus)})
    common = recipe.model_dump(), [config.model_dump() for config in regions], str(output / "manifest.json")
    for bank in _feature_banks(recipe, manifest, regions)[1]:
        bank.prepare()
        if bank.missing():
            _complete(ray, slots, bank, f"features, {bank.split}", _write_features, (*common, bank.split), output)


def _feature_banks(
    recipe: Recipe, manifest: Manifest, regions: Sequence[ModelConfig]
) -> tuple[Task, list[FeatureBank], Sequence[ModelConfig] | None]:
    folder, task = recipe.train.feature_bank, build_task(recipe, len(manifest.classes))
    assert isinstance(folder, str)
    batch = recipe.data.batch_size(len(manifest.classes), len(manifest.ids("train")))
    chunk = min(max(1, batch // recipe.train.micro_batches), recipe.data.eval_batch_size)
    pooled = regions if isinstance(task.model, FPCN) else None
    return task, build_banks(Path(folder), recipe, task, manifest, chunk=chunk, regions=pooled), pooled


def _complete(
    ray: Any, slots: Slots, bank: ViewBank, name: str, write_one: Callable[..., None], common: tuple, output: Path
) -> None:
    """Let each place of the cluster write a share of a bank: ``write_one(*common, share, shares, log)``."""
    # What a killed process leaves undone, its next attempt does.
    write = ray.remote(write_one).options(**slots.options, max_retries=_ATTEMPTS)
    log = str(output / "logs" / "bank.log")
    tasks = [write.remote(*common, share, slots.count, log) for share in range(slots.count)]
    total, shown = bank.chunks, -1
    while tasks:
        done, tasks = ray.wait(tasks, num_returns=1, timeout=1.0)
        for task in done:
            task_result(ray, task)
        tenth = 10 * (total - bank.missing()) // total
        if tenth != shown:
            print(f"{name}: {10 * tenth} %", flush=True)
            shown = tenth


def _write_share(recipe: dict[str, Any], folder: str, manifest: str, share: int, shares: int, log: str) -> None:
    """Write a share of the bank in ``folder``, for the images of a manifest file; see :meth:`SoftLabelBank.write`."""
    write_output_to(log)
    parsed, images, device = Recipe.model_validate(recipe), Manifest.load(Path(manifest)), own_device()
    use_threads(parsed.data.threads, device)
    teacher = open_teacher(parsed, images, device)
    SoftLabelBank(Path(folder), parsed, images).write(teacher, share=share, shares=shares, device=device)


def _write_features(
    recipe: dict[str, Any], regions: list[dict[str, Any]], manifest: str, split: str, share: int, shares: int, log: str
) -> None:
    """Write a share of the feature bank of a split, for the images of a manifest file."""
    write_output_to(log)
    parsed, images, device = Recipe.model_validate(recipe), Manifest.load(Path(manifest)), own_device()
    use_threads(parsed.data.threads, device)
    task, banks, pooled = _feature_banks(parsed, images, [ModelConfig.model_validate(region) for region in regions])
    task = task.to(device)
    if parsed.train.channels_last:  # as an engine does
        task = task.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    (bank,) = [bank for bank in banks if bank.split == split]
    write_share(bank, parsed, task, pooled, share, shares, device)
