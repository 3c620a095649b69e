"""A soft-label bank written by all places of a cluster at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpcn_dist.data.manifest import Manifest
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.ranks import own_device, use_threads
from fpcn_dist.studies.cluster import Slots, task_result
from fpcn_dist.studies.cluster.ranks import write_output_to
from fpcn_dist.training.soft_labels.bank import SoftLabelBank, prepare_bank
from fpcn_dist.training.soft_labels.teacher import open_teacher

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
    # What a killed process leaves undone, its next attempt does.
    write = ray.remote(_write_share).options(**slots.options, max_retries=_ATTEMPTS)
    common = recipe.model_dump(), str(bank.folder), str(output / "manifest.json")
    log = str(output / "logs" / "bank.log")
    tasks = [write.remote(*common, share, slots.count, log) for share in range(slots.count)]
    total, shown = bank.chunks, -1
    while tasks:
        done, tasks = ray.wait(tasks, num_returns=1, timeout=1.0)
        for task in done:
            task_result(ray, task)
        tenth = 10 * (total - bank.missing()) // total
        if tenth != shown:
            print(f"soft labels: {10 * tenth} %", flush=True)
            shown = tenth


def _write_share(recipe: dict[str, Any], folder: str, manifest: str, share: int, shares: int, log: str) -> None:
    """Write a share of the bank in ``folder``, for the images of a manifest file; see :meth:`SoftLabelBank.write`."""
    write_output_to(log)
    parsed, images, device = Recipe.model_validate(recipe), Manifest.load(Path(manifest)), own_device()
    use_threads(parsed.data.threads, device)
    teacher = open_teacher(parsed, images, device)
    SoftLabelBank(Path(folder), parsed, images).write(teacher, share=share, shares=shares, device=device)
