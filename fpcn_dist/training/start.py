"""The start of a training: the data are checked, and it is settled where each run goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fpcn_dist.data.images import refusal_table
from fpcn_dist.data.manifest import Manifest, build_manifest
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import CheckpointFolder, CheckpointInfo, read_checkpoint, require_same_recipe
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.training.soft_labels.teacher import name_teacher


def start_runs(
    runs: Sequence[RunFolder], recipes: Sequence[Recipe], data: Path | Manifest, ranks: Ranks, resume: str
) -> list[dict[str, Any]]:
    """Check the data unless they are, settle where each run starts from, and describe it in its folder; for the first
    rank alone.

    Returns:
        For each run: ``checkpoint``, the path of the one to resume from or ``None``; its ``step``, else 0; and
        ``recipe``, with the hash of its teacher where it has one, as nested dictionaries.

    Raises:
        UserError: folder, data or checkpoint cannot be used, or data or recipe have changed since it was written.
    """
    for run in runs:
        run.create()
    recipes = [name_teacher(recipe) for recipe in recipes]
    manifest = data if isinstance(data, Manifest) else _check_data(data, recipes[0])
    return [_start_run(run, recipe, manifest, ranks, resume) for run, recipe in zip(runs, recipes, strict=True)]


def _check_data(data: Path, recipe: Recipe) -> Manifest:
    manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
    if manifest.refused:
        Console(soft_wrap=True).print(refusal_table(manifest.refused))
    return manifest


def _start_run(run: RunFolder, recipe: Recipe, manifest: Manifest, ranks: Ranks, resume: str) -> dict[str, Any]:
    checkpoints = CheckpointFolder(run.checkpoints, keep=recipe.train.keep_checkpoints)
    if resume == "never":
        checkpoints.clear()
    checkpoint = Path(resume) if resume not in ("auto", "never") else checkpoints.newest()
    step, before = 0, ranks.world_size
    if checkpoint is not None:
        _, info = read_checkpoint(checkpoint)
        require_same_recipe(recipe, info, checkpoint)
        _require_same_data(manifest, info, checkpoint, run)
        step = info.step
        print(f"resuming from step {step} ({checkpoint})", flush=True)
        before = run.first_world_size() or before
        recipe = _in_parts_as_large(recipe, before, ranks, len(manifest.classes))
    run.describe(recipe, manifest, ranks, first_world_size=before)
    run.outcome.unlink(missing_ok=True)
    return {"checkpoint": checkpoint and str(checkpoint), "step": step, "recipe": recipe.model_dump()}


def _in_parts_as_large(recipe: Recipe, ranks_before: int, ranks: Ranks, classes: int) -> Recipe:
    """``recipe`` cut into more parts where fewer ranks share the batch, so that a part needs no more memory."""
    batch_size = recipe.data.batch_size(classes)
    share, largest = batch_size // ranks.world_size, batch_size // ranks_before // recipe.train.micro_batches
    parts = next((p for p in range(1, share + 1) if share % p == 0 and share // p <= largest), share)
    if ranks.world_size >= ranks_before or parts <= recipe.train.micro_batches:
        return recipe
    now = f"{ranks.world_size} rank(s) where there were {ranks_before}"
    print(f"{now}: each cuts its share of a batch into {parts} parts", flush=True)
    return recipe.changed(**{"train.micro_batches": parts})


def _require_same_data(manifest: Manifest, info: CheckpointInfo, checkpoint: Path, run: RunFolder) -> None:
    if manifest.hash == info.manifest_hash:
        return
    reason = "was written for other images"
    if info.classes != manifest.classes:
        reason = f"was written for other classes ({', '.join(info.classes)}; now {', '.join(manifest.classes)})"
    elif run.manifest.is_file():
        reason += f" ({_changes(Manifest.load(run.manifest), manifest)})"
    raise UserError("checkpoint", checkpoint, reason, "restore the data, or train anew with another --output")


def _changes(before: Manifest, now: Manifest) -> str:
    """What differs between two manifests, in words: how many images, and the first of each kind."""
    old = {image.path: image for image in before.images}
    new = {image.path: image for image in now.images}
    kinds = {
        "added": [p for p in new if p not in old],
        "removed": [p for p in old if p not in new],
        "changed": [p for p in new if p in old and new[p].digest != old[p].digest],
        "moved to another split": [p for p in new if p in old and new[p].split != old[p].split],
    }
    found = [f"{len(paths)} {kind}, such as {paths[0]}" for kind, paths in kinds.items() if paths]
    return "; ".join(found) or "the checkpoint is of another folder"
