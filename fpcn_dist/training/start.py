"""The start of a training: the data are checked, and it is settled where each run goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.notices import show_notices
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    CheckpointInfo,
    TrainingState,
    read_checkpoint,
    require_same_recipe,
)
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.training.pretrained import describe_weights, name_preprocessing
from fpcn_dist.training.soft_labels.teacher import name_teacher


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on, the same on every rank.

    Attributes:
        recipe: what it computes, with the hash of its teacher where it has one, and how its network is shown images.
        state: what it goes on from; ``None`` where it begins.
        best: the best validation accuracy so far, where there is one.
        step: updates made so far.
    """

    recipe: Recipe
    state: TrainingState | None
    best: float | None
    step: int


def prepare_data(data: Address | Manifest, recipe: Recipe, ranks: Ranks) -> Manifest:
    """Check the images unless that was done, and give the manifest to every rank. Collective.

    Raises:
        UserError: the data cannot be used.
    """
    if isinstance(data, Manifest):
        return data

    def check() -> str:
        manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
        show_notices(manifest.refused, manifest.notices)
        return manifest.to_json()

    return Manifest.from_json(ranks.on_first(check))


def open_run(run: RunFolder, recipe: Recipe, manifest: Manifest, ranks: Ranks, resume: str) -> Start:
    """Settle where a run starts from, and describe it in its folder. Collective.

    The first rank reads checkpoints until one is whole; the others read that one alone.

    Args:
        run: its folder.
        recipe: what it is asked to compute.
        manifest: the images.
        ranks: this process among all.
        resume: see :func:`fpcn_dist.training.loop.train`.

    Raises:
        UserError: folder, weights, teacher or checkpoint cannot be used, or data or recipe have changed since it was
            written.
    """
    found: Checkpoint | None = None

    def settle() -> dict[str, Any]:
        nonlocal found
        run.create()
        named = name_teacher(recipe)
        checkpoints = CheckpointFolder(run.checkpoints, keep=recipe.train.keep_checkpoints)
        found = _find(checkpoints, resume)
        best, before = None, ranks.world_size
        if found is None:
            named = name_preprocessing(named)
            for line in describe_weights(named, manifest.classes):
                print(line, flush=True)
        else:
            require_same_recipe(named, found.info, found.path)
            _require_same_data(manifest, found.info, found.path, run)
            print(f"resuming from step {found.info.step} ({found.path})", flush=True)
            named = named.with_preprocessing(found.info.preprocessing)
            best, before = checkpoints.best_accuracy(), run.first_world_size() or before
            named = _in_parts_as_large(named, before, ranks, manifest)
        run.describe(named, manifest, ranks, first_world_size=before)
        run.outcome.unlink(missing_ok=True)
        return {"recipe": named.model_dump(), "checkpoint": found and str(found.path), "best": best}

    settled = ranks.on_first(settle)
    state = None
    if settled["checkpoint"] is not None:
        state = found.state if found else read_checkpoint(Path(settled["checkpoint"]))[0]
    return Start(Recipe.model_validate(settled["recipe"]), state, settled["best"], state.step if state else 0)


def _find(checkpoints: CheckpointFolder, resume: str) -> Checkpoint | None:
    if resume == "never":
        checkpoints.clear()
        return None
    if resume == "auto":
        return checkpoints.newest()
    return Checkpoint(Path(resume), *read_checkpoint(Path(resume)))


def _in_parts_as_large(recipe: Recipe, ranks_before: int, ranks: Ranks, manifest: Manifest) -> Recipe:
    """``recipe`` cut into more parts where fewer ranks share the batch, so that a part needs no more memory."""
    batch_size = recipe.data.batch_size(len(manifest.classes), len(manifest.ids("train")))
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
