"""From checkpoints to what a user keeps: the exported model, its evaluation and the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import PurePath

import numpy as np
from rich.table import Table

from fpcn_dist.data.index.manifest import on_every_rank
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.models import Classifier, build_model
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import CheckpointFolder, model_weights
from fpcn_dist.runs.evaluation import EVALUATION_FILE, Evaluation, evaluate
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.model_folder import load_model, save_model, write_card
from fpcn_dist.runs.other_images import (
    EVERYTHING,
    OtherImages,
    find_others,
    remarks,
    require_same_images,
    with_labels_of,
)
from fpcn_dist.runs.probe import Probe
from fpcn_dist.runs.report.run import build_report
from fpcn_dist.runs.report.samples import FOLDER as SAMPLES
from fpcn_dist.runs.report.samples import SampleCollector
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import file_stem, printable
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.runtime.terminal import Terminal

Frozen = Callable[[Classifier, int], Classifier]
"""Prepares a model to look at so many images, and never to be trained again."""


def finish_run(
    run: RunFolder,
    checkpoints: CheckpointFolder,
    ranks: Ranks,
    frozen: Frozen = lambda model, _: model,
    *,
    evaluate: bool = True,
) -> None:
    """Export the best checkpoint (the newest if nothing was validated), evaluate it, write the report. Collective.

    Where the data have neither validation nor test images, the report says that nothing was evaluated. Where
    ``evaluate`` is false, the model is exported alone: :func:`evaluate_run` makes up for the rest.
    """
    name, step = ranks.on_first(lambda: _export(run, checkpoints))
    if not evaluate:
        return
    _, manifest = run.open()
    if len(manifest.ids("val")) or len(manifest.ids("test")):
        evaluate_run(run, ranks, checkpoint=name, step=step, frozen=frozen)
    else:
        ranks.on_first(lambda: _report_alone(run))


def _export(run: RunFolder, checkpoints: CheckpointFolder) -> tuple[str, int]:
    chosen = checkpoints.best() or checkpoints.newest()
    assert chosen is not None, "the last step writes a checkpoint, as does a start from one"
    path, state, info = chosen
    recipe, _ = run.open()
    model = build_model(recipe.model.changed(pretrained=False), len(info.classes), task=recipe.task)
    model.load_state_dict(model_weights(state))
    save_model(run.path, model, recipe, info.classes, origin=run.origin())
    return path.name, info.step


def _report_alone(run: RunFolder) -> None:
    # What an evaluation has left there was of other weights.
    (run.path / EVALUATION_FILE).unlink(missing_ok=True)
    shutil.rmtree(run.path / SAMPLES, ignore_errors=True)
    console = Terminal()
    console.print("nothing was evaluated: the data have no validation or test images")
    console.print(f"report {build_report(run.path)}")


def evaluate_run(
    run: RunFolder,
    ranks: Ranks,
    *,
    split: str | None = None,
    data: Address | None = None,
    checkpoint: str | None = None,
    step: int | None = None,
    frozen: Frozen = lambda model, _: model,
) -> Evaluation:
    """Evaluate the exported model of a run; rewrite evaluation.json, samples, model card and report. Collective.

    Args:
        run: the run folder.
        ranks: this process among all.
        split: "train", "val" or "test"; ``None`` takes test images where the data have some, else val.
        data: the image folder, where it is no longer where it was during training; its images must be the same.
        checkpoint, step: what the exported weights are; known from the last evaluation if omitted.
        frozen: see :data:`Frozen`; by default the model is evaluated as it is.

    Raises:
        UserError: no run or no model in the folder, no images in the split, other images than those of the run, an
            image that cannot be read.
    """
    recipe, manifest = run.open()
    if len({json.dumps(origin) for origin in ranks.gather([run.origin()])}) > 1:
        reason = "its recipe or manifest is not the same on all ranks: the folder is not shared"
        raise UserError("RUN", run.path, reason, "evaluate on one machine, or on storage that all nodes see")
    split = split or ("test" if len(manifest.ids("test")) else "val")
    if not len(manifest.ids(split)):
        have = ", ".join(name for name in ("train", "val", "test") if len(manifest.ids(name)))
        raise UserError("--split", split, "the data have no such images", f"choose one of {have}")
    if data is not None:
        manifest = dataclasses.replace(manifest, root=str(data.resolve()))
        hint = "restore them; other images than the run's are evaluated with --split all"
        ranks.on_first(lambda: require_same_images(manifest, manifest.ids(split).tolist(), f"{split} images", hint))
    model, info = load_model(run.path, ranks.device)
    before = Evaluation.load(run.path)
    if checkpoint is None and before is not None:
        checkpoint, step = before.checkpoint, before.step
    samples = SampleCollector(recipe.data)
    loader = EvalLoader.from_manifest(
        manifest, split, recipe.data, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device
    )
    evaluation = evaluate(
        frozen(model, len(manifest.ids(split)) // ranks.world_size),
        loader,
        info.classes,
        num_images=len(manifest.ids(split)),
        split=split,
        checkpoint=checkpoint or "",
        step=step or 0,
        precision=recipe.train.precision,
        group=ranks.group,
        samples=samples,
    )
    samples.write(run.path, info.classes, [image.path for image in manifest.images], group=ranks.group)
    ranks.on_first(lambda: _write(run, recipe, evaluation))
    return evaluation


def _write(run: RunFolder, recipe: Recipe, evaluation: Evaluation) -> None:
    evaluation.save(run.path)
    probe = Probe.load(run.path)
    write_card(run.path, recipe, evaluation.classes, evaluation, probe)
    report = build_report(run.path)
    console = _show(f"{run.path}: {evaluation.images} {evaluation.split} images", evaluation)
    if probe is not None:
        console.print(probe.verdict(evaluation))
    console.print(f"report {report}")


def _show(title: str, evaluation: Evaluation) -> Terminal:
    """Print the scores of each class and of all, and give the terminal for what is to be said below them."""
    table = Table(title=printable(title), title_justify="left")
    for column in ("class", "images", "precision", "recall", "F1"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for row in evaluation.per_class:
        scores = (_percent(score) for score in (row.precision, row.recall, row.f1))
        table.add_row(printable(row.name), str(row.images), *scores)
    console = Terminal()
    console.print(table)
    accuracies = f"accuracy {_percent(evaluation.accuracy)}, balanced {_percent(evaluation.balanced_accuracy)}"
    console.print(f"{evaluation.split} {accuracies}")
    return console


def evaluate_others(
    run: RunFolder, ranks: Ranks, data: Address, *, frozen: Frozen = lambda model, _: model
) -> Evaluation:
    """Evaluate the exported model of a run on all labelled images of another folder. Collective.

    Writes evaluation-NAME.json beside the run's own evaluation, which stays as it is, as do model card and report.

    Args:
        run: the run folder.
        ranks: this process among all.
        data: any form of data set whose classes the model knows.
        frozen: see :data:`Frozen`.

    Raises:
        UserError: no run or no model in the folder, no data set, a class that the model does not know, an image that
            cannot be read.
    """
    recipe, own = run.open()
    model, info = load_model(run.path, ranks.device)
    data = data.resolve()
    found = on_every_rank(lambda: find_others(data, recipe), ranks)
    others = with_labels_of(own, found)
    before = Evaluation.load(run.path)
    ids = np.arange(len(found.images))
    blobs = [found.blob(index) for index in ids.tolist()]
    place = {"rank": ranks.rank, "world_size": ranks.world_size, "device": ranks.device}
    evaluation = evaluate(
        frozen(model, len(blobs) // ranks.world_size),
        EvalLoader(blobs, others.labels, ids, recipe.data, **place),
        info.classes,
        num_images=len(blobs),
        split=EVERYTHING,
        checkpoint=before.checkpoint if before else "",
        step=before.step if before else 0,
        precision=recipe.train.precision,
        group=ranks.group,
    )
    evaluation = dataclasses.replace(evaluation, data=str(data))
    ranks.on_first(lambda: _write_others(run, evaluation, others))
    return evaluation


def _write_others(run: RunFolder, evaluation: Evaluation, others: OtherImages) -> None:
    data = evaluation.data or ""
    name = f"evaluation-{file_stem(PurePath(data).name)}.json"
    there = Evaluation.load(run.path, name)
    if there is not None and there.data != data:  # another folder of the same name
        name = f"{name.removesuffix('.json')}-{hashlib.sha256(os.fsencode(data)).hexdigest()[:12]}.json"
    evaluation.save(run.path, name)
    console = _show(f"{run.path}: {evaluation.images} images of {data}", evaluation)
    for line in remarks(others):
        console.print(line)
    console.print(f"Wrote {run.path / name}.")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
