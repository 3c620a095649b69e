"""The start of a training: the data are checked, it is settled where each run goes on from, and only then written."""

from __future__ import annotations

import functools
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest, on_every_rank
from fpcn_dist.data.index.notices import show_notices
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import (
    BEST,
    Best,
    Checkpoint,
    CheckpointFolder,
    CheckpointInfo,
    TrainingState,
    changed_fields,
    read_checkpoint,
    require_same_recipe,
)
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.metrics import METRICS_FILE
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.errors import Outage, UserError
from fpcn_dist.runtime.files import link_or_copy
from fpcn_dist.runtime.names import printable
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.training.engine.optim import learning_rate
from fpcn_dist.training.pretrained import describe_weights, name_preprocessing
from fpcn_dist.training.resume import changes_of_images, find_origin, look_at_end, what_is_asked
from fpcn_dist.training.schedule import steps_per_epoch
from fpcn_dist.training.soft_labels.teacher import name_teacher


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on, the same on every rank.

    Attributes:
        recipe: what it computes, with the hash of its teacher where it has one, and how its network is shown images.
        state: what it goes on from; ``None`` where it begins.
        best: the best checkpoint so far, where there is one.
        step: updates made so far.
        finished: it has come to its end, and nothing is left to do.
        writing: what :func:`begin_run` needs to know.
    """

    recipe: Recipe
    state: TrainingState | None = None
    best: Best | None = None
    step: int = 0
    finished: bool = False
    writing: Mapping[str, Any] = field(default_factory=dict)


def prepare_data(data: Address | Manifest, recipe: Recipe, ranks: Ranks) -> Manifest:
    """Check the images unless that was done, and give the manifest to every rank. Collective.

    Raises:
        UserError: the data cannot be used.
    """
    if isinstance(data, Manifest):
        return data

    def check() -> Manifest:
        manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
        show_notices(manifest.refused, manifest.notices)
        return manifest

    return on_every_rank(check, ranks)


def settle_start(
    run: RunFolder, recipe: Recipe, manifest: Manifest, ranks: Ranks, resume: str = "auto", *, extend: bool = False
) -> Start:
    """Settle where a run starts from; nothing in its folder changes. Collective.

    The first rank reads checkpoints until one is whole; the others read that one alone.

    Args:
        run: its folder.
        recipe: what it is asked to compute.
        manifest: the images.
        ranks: this process among all.
        resume, extend: see :func:`fpcn_dist.training.loop.train`.

    Raises:
        UserError: folder, weights, teacher or checkpoint cannot be used, or data or recipe have changed since it was
            written, or differ between ranks; the folder holds a finished run of another recipe or of other images.
    """
    _require_same_everywhere(recipe, manifest, ranks)
    found: list[Checkpoint] = []
    settled = ranks.on_first(functools.partial(_settle, run, recipe, manifest, ranks, resume, extend, found))
    recipe = Recipe.model_validate(settled.pop("recipe"))
    if settled.pop("finished"):
        return Start(recipe, finished=True)
    best, path = settled.pop("best"), settled.pop("checkpoint")
    state = None
    if path is not None:
        state = found[0].state if found else read_checkpoint(Path(path))[0]
    return Start(recipe, state, best and (best[0], best[1]), state.step if state else 0, writing=settled)


def _settle(
    run: RunFolder,
    recipe: Recipe,
    manifest: Manifest,
    ranks: Ranks,
    resume: str,
    extend: bool,
    found: list[Checkpoint],
) -> dict[str, Any]:
    """On the first rank: what all need to know, as JSON; the checkpoint that was read is put into ``found``."""
    named, checkpoints = name_teacher(recipe), CheckpointFolder(run.checkpoints, keep=recipe.train.keep_checkpoints)
    asked = what_is_asked(run, resume)
    end = "open" if asked == "never" else look_at_end(run, named, manifest, checkpoints, asked, extend=extend)
    if end == "finished":
        return {"recipe": named.model_dump(), "finished": True}
    origin = find_origin(run, checkpoints, resume, asked)
    checkpoint, best, before = origin.checkpoint, None, ranks.world_size
    if checkpoint is None:
        named = name_preprocessing(named)
        for line in describe_weights(named, manifest.classes):
            print(printable(line), flush=True)
    else:
        found.append(checkpoint)
        require_same_recipe(named, checkpoint.info, checkpoint.path, extend=extend)
        _require_same_data(manifest, checkpoint.info, checkpoint.path, run)
        print(f"resuming from step {checkpoint.info.step} ({printable(checkpoint.path)})", flush=True)
        _say_extended(named, checkpoint.info, manifest)
        named = named.with_preprocessing(checkpoint.info.preprocessing)
        best = (
            checkpoints.best() if origin.own else CheckpointFolder(checkpoint.path.parent, keep=1).best_of(checkpoint)
        )
        before = (run.first_world_size() if origin.own else None) or before
        named = _in_parts_as_large(named, before, ranks, manifest)
    taken = {} if checkpoint is None else {checkpoints.path(checkpoint.info.step).name: str(checkpoint.path)}
    if best is not None:
        taken[BEST] = str(best.path)
    return {
        "recipe": named.model_dump(),
        "finished": False,
        "checkpoint": checkpoint and str(checkpoint.path),
        "best": best and [best.info.step, best.info.accuracy],
        "ranks_before": before,
        "own": origin.own,
        "taken": taken,
        "results_aside": end == "trained on",
        "record": dict(origin.record),
    }


def begin_run(run: RunFolder, start: Start, manifest: Manifest, ranks: Ranks) -> None:
    """Write to the folder what the run computes, once nothing stands in its way. Collective.

    What is in the folder of another run goes to previous/ first, and the checkpoint that the run begins from becomes
    its own.

    Raises:
        UserError: the folder cannot be written to.
    """
    ranks.gather([])  # all of them have come so far

    def write() -> None:
        writing = start.writing
        try:
            if not writing["own"]:
                _make_room(run, {name: Path(path) for name, path in writing["taken"].items()})
            elif writing["results_aside"]:
                run.set_results_aside()
        except OSError as error:
            reason = f"what is in it could not be moved to previous/ ({error.strerror or error})"
            raise Outage("--output", run.path, reason, "see to its storage, or choose another folder") from error
        ranks_before = writing["ranks_before"]
        run.describe(start.recipe, manifest, ranks, first_world_size=ranks_before, start=writing["record"])
        run.outcome.unlink(missing_ok=True)

    ranks.on_first(write)


def _make_room(run: RunFolder, taken: Mapping[str, Path]) -> None:
    """Move what is there to previous/, and put the checkpoints ``taken``, by the names they get, in its place."""
    place = run.path / ".taken"
    shutil.rmtree(place, ignore_errors=True)
    if taken:
        (place / "checkpoints").mkdir(parents=True)
        for name, path in taken.items():
            link_or_copy(path, place / "checkpoints" / name)
        own = any(path.parent.resolve() == run.checkpoints.resolve() for path in taken.values())
        if own and (run.path / METRICS_FILE).exists():
            link_or_copy(run.path / METRICS_FILE, place / METRICS_FILE)
    run.set_aside()
    CheckpointFolder(run.checkpoints, keep=1).clear()
    if taken:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        for path in place.iterdir():
            path.replace(run.path / path.name)
        place.rmdir()


def _require_same_everywhere(recipe: Recipe, manifest: Manifest, ranks: Ranks) -> None:
    """Refuse ranks that were started with other recipes or images than the first one. Collective."""
    if ranks.world_size == 1:
        return
    mine = {"host": socket.gethostname(), "recipe": recipe.model_dump(), "manifest": manifest.hash}
    first, *others = ranks.gather([mine])
    for rank, other in enumerate(others, start=1):
        who = f"rank {rank} on {other['host']}"
        changed = changed_fields(Recipe.model_validate(other["recipe"]), CheckpointInfo(0, first["recipe"], "", ()))
        if changed:
            reason = f"{who} was started with another recipe than the first: {', '.join(changed)}"
            raise UserError("recipe", None, reason, "start all ranks with the same command")
        if other["manifest"] != first["manifest"]:
            reason = f"{who} has other images, or another split of them, than the first"
            raise UserError("manifest", None, reason, "let all ranks read the same data and the same folder")


def _say_extended(recipe: Recipe, info: CheckpointInfo, manifest: Manifest) -> None:
    """Tell what more epochs mean for the learning rate, where there are more than the run was planned for."""
    planned, now, step = info.recipe["train"]["epochs"], recipe.train.epochs, info.step
    if now <= planned:
        return
    per_epoch = steps_per_epoch(recipe, manifest)
    rates = [learning_rate(recipe.optim, step, per_epoch, epochs * per_epoch) for epochs in (planned, now)]
    then = f"as in a run planned for {now} epochs ({rates[1]:.3g} now, where {planned} epochs had {rates[0]:.3g})"
    how = f"the steps so far keep the learning rates that they had; from here on they are {then}"
    print(f"extended from {planned} to {now} epochs at step {step}: {how}", flush=True)


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
        reason += f" ({changes_of_images(Manifest.load(run.manifest), manifest)})"
    raise UserError("checkpoint", checkpoint, reason, "restore the data, or train anew with another --output")
