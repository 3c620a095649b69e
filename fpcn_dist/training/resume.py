"""From which checkpoint a run goes on, or that it begins, or that nothing is left to do. Nothing here writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import (
    BEST,
    Checkpoint,
    CheckpointFolder,
    CheckpointInfo,
    changed_fields,
    read_checkpoint,
)
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.model_folder import load_model
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.processes import describe_launch, is_started_again
from fpcn_dist.training.schedule import steps_per_epoch

_ANEW = "choose another --output, or begin again with --resume never, which moves what is there to previous/"

End = Literal["open", "finished", "again", "trained on"]
"""Of a run that is there: it has not come to its end; it has, and all is there; what was made of it has to be made
again; or there are steps to make, by more epochs or because its last checkpoints are gone."""


class Origin(NamedTuple):
    """Where a start goes on from.

    Attributes:
        checkpoint: what it goes on from; ``None`` where it begins.
        own: whether that is the newest of the folder, whose run goes on.
        record: how the run was asked to begin, for its folder.
    """

    checkpoint: Checkpoint | None
    own: bool
    record: Mapping[str, Any]


def what_is_asked(run: RunFolder, resume: str) -> str:
    """``resume``, or ``"auto"`` where a run that is there began so already.

    A path counts once, as the same command goes on; ``never`` counts again when a user gives it again, but not when a
    launcher starts the ranks again, or a batch system the job.
    """
    record = run.read_start()
    if record.get("resume") != _written(resume):
        return resume
    if resume == "never":
        return "auto" if is_started_again(record) else "never"
    there = CheckpointFolder(run.checkpoints, keep=1).steps() or run.read_outcome()[0] == "finished"
    return "auto" if there else resume


def find_origin(run: RunFolder, checkpoints: CheckpointFolder, resume: str, asked: str) -> Origin:
    """Read the checkpoint that a start goes on from.

    Args:
        run: its folder.
        checkpoints: of the folder.
        resume: as it was given.
        asked: what :func:`what_is_asked` makes of it.

    Raises:
        UserError: there is no such checkpoint, or none that is whole.
    """
    anew = {"resume": _written(resume), **describe_launch()}
    if asked == "never":
        return Origin(None, False, anew)
    if asked != "auto":
        chosen, steps = _read(asked, run), checkpoints.steps()
        if not steps or chosen.path.resolve() != checkpoints.path(steps[-1]).resolve():
            return Origin(chosen, False, anew)
    newest = checkpoints.newest()
    goes_on = newest is not None and asked == "auto"
    return Origin(newest, newest is not None, (goes_on and run.read_start()) or anew)


def _written(resume: str) -> str:
    return resume if resume in ("auto", "never", "best") else str(Path(resume).expanduser().absolute())


def _read(resume: str, run: RunFolder) -> Checkpoint:
    """A checkpoint by its path, that of its run or folder (the newest), or ``best`` at its end (the best)."""
    path = run.checkpoints / "best" if resume == "best" else Path(resume).expanduser()
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        newest = CheckpointFolder(folder, keep=1).newest()
        if newest is None:
            raise UserError(
                "--resume", resume, "holds no checkpoint", "give a run folder, or a file of its checkpoints/"
            )
        return newest
    if path.name == "best" and not path.exists():
        inner = path.parent / "checkpoints"
        path = (inner if inner.is_dir() else path.parent) / BEST
    return Checkpoint(path, *read_checkpoint(path))


def look_at_end(
    run: RunFolder, recipe: Recipe, manifest: Manifest, checkpoints: CheckpointFolder, asked: str, *, extend: bool
) -> End:
    """Find out whether the run in a folder has come to its end, and what is left to do.

    Args:
        run: the folder.
        recipe, manifest: what is asked for now.
        checkpoints: of the folder.
        asked: see :func:`what_is_asked`; not ``"never"``.
        extend: whether the run may be trained for more epochs.

    Raises:
        UserError: a finished run would be overwritten by another one.
    """
    if run.read_outcome()[0] != "finished":
        return "open"
    if asked != "auto":
        raise UserError(
            "--output", run.path, "holds a finished run", "choose another --output for one that goes on from it"
        )
    before = run.described()
    _require_same(run, recipe, manifest, before, extend=extend)
    longer, steps = recipe.train.epochs > before.recipe["train"]["epochs"], checkpoints.steps()
    if steps and steps[-1] < recipe.train.epochs * steps_per_epoch(recipe, manifest):
        return "trained on"
    lack = None if longer else _lack(run, remade=bool(steps))
    if (longer or lack) and not steps:
        reason = f"holds a finished run without checkpoints{f', and {lack}' if lack else ''}"
        raise UserError("--output", run.path, reason, _ANEW)
    if lack:
        print(f"{run.path} has come to its end, but {lack}: it is made again from the best checkpoint", flush=True)
        return "again"
    _say_finished(run, checkpoints)
    return "finished"


def _require_same(run: RunFolder, recipe: Recipe, manifest: Manifest, before: CheckpointInfo, *, extend: bool) -> None:
    changed = changed_fields(recipe, before, extend=extend)
    if changed:
        longer = not changed_fields(recipe, before, extend=True)
        hint = f"add --extend to train it on, or {_ANEW}" if longer else _ANEW
        raise UserError("--output", run.path, f"holds a finished run of another recipe: {', '.join(changed)}", hint)
    if manifest.hash != before.manifest_hash:
        changes = changes_of_images(Manifest.load(run.manifest), manifest)
        raise UserError("--output", run.path, f"holds a finished run on other images ({changes})", _ANEW)


def _lack(run: RunFolder, *, remade: bool) -> str | None:
    """What of a finished run is missing or damaged, in words: its model; or its report, if that can be ``remade``."""
    try:
        load_model(run.path)
    except UserError as error:
        return f"its model {error.reason}"
    return "its report is missing" if remade and not (run.path / "report.html").is_file() else None


def _say_finished(run: RunFolder, checkpoints: CheckpointFolder) -> None:
    best = checkpoints.folder / BEST
    if best.exists():
        try:
            read_checkpoint(best)
        except UserError as error:
            print(f"warning: {best} {error.reason}; the model that was made of it is whole, and stays", flush=True)
    evaluation = Evaluation.load(run.path)
    score = f": {evaluation.split} accuracy {100 * evaluation.accuracy:.1f} %" if evaluation else ""
    print(f"{run.path} is finished{score}; report {run.path / 'report.html'}", flush=True)


def changes_of_images(before: Manifest, now: Manifest) -> str:
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
