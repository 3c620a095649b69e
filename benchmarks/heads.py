"""Heads on the frozen features of a backbone, cross-validated: FPCN's beside a linear one, and beside the probe.

Photographs that nearly look alike lie in the same fold. The learning rate of each row is the one that does best on a
validation fold, in the first split and with the first seed; the test folds decide nothing.

Shape legend: N images, V views, C channels of a pooled vector, B images of a batch.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import EvalLoader, ViewLoader
from fpcn_dist.data.sampler import BalancedSampler
from fpcn_dist.deploy.onnx_backbone import frozen_features
from fpcn_dist.models import FPCN, build_model
from fpcn_dist.recipe import command_line
from fpcn_dist.recipe.command_line import Overrides
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.evaluation import balanced_accuracy
from fpcn_dist.runs.probe import score_split
from fpcn_dist.runtime.cores import usable_cores
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder, write_text
from fpcn_dist.runtime.ranks import use_threads
from fpcn_dist.tasks import Task, build_task
from fpcn_dist.training.engine.optim import build_optimizer, learning_rate, set_rate
from fpcn_dist.training.feature_bank.encoder import Encoder
from fpcn_dist.training.pretrained import name_preprocessing

RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates of AdamW to choose from."""
ALIKE = 0.95
"""Cosine of two feature vectors from which on their photographs count as near-duplicates."""
_CPU = torch.device("cpu")
Ids = NDArray[np.int64]


class Row(NamedTuple):
    """A head and its loss."""

    name: str
    region: str
    changes: dict[str, Any]


def rows(batch_size: int) -> list[Row]:
    """The heads that are compared; random pairs and shifts are as many as the hardest pairs."""
    few = 2 * batch_size

    def fpcn(pairs: str, num_pairs: int | None, head: str = "product") -> dict[str, Any]:
        return {"task": "contrast", "contrast.pairs": pairs, "contrast.num_pairs": num_pairs, "model.head": head}

    return [
        Row("linear head", "none", fpcn("all", None) | {"task": "classify"}),
        Row("FPCN, all pairs", "none", fpcn("all", None)),
        Row("FPCN, hardest pairs", "none", fpcn("hardest", few)),
        Row("FPCN, random pairs", "none", fpcn("random", few)),
        Row("FPCN, shifts", "none", fpcn("shifts", few)),
        Row("FPCN, gates, hardest pairs", "none", fpcn("hardest", few, "gated")),
        Row("FPCN, all pairs, region", "threshold", fpcn("all", None)),
    ]


@dataclass
class Args:
    """Train heads on the frozen features of a recipe's backbone, and print their accuracies over folds and seeds."""

    data: Path
    """Folder of photographs, DIR/<class>/*.jpg."""
    recipe: Path | None = None
    """YAML recipe whose backbone, image sizes, views, head and batches are taken."""
    folds: int = 5
    """Parts of the photographs, each of which is the test part once."""
    seeds: int = 3
    """Trainings of each row on each split."""
    steps: int = 300
    """Updates of a training."""
    output: Path | None = None
    """JSON file for what every training reached."""
    overrides: Overrides = field(default_factory=Recipe)


class Bank(NamedTuple):
    """The features of all photographs, by region.

    Attributes:
        views: [N, V, C] of training views.
        centre: [N, C] of the central view.
    """

    views: dict[str, Tensor]
    centre: dict[str, Tensor]


def compute(recipe: Recipe, manifest: Manifest, regions: list[str]) -> Bank:
    """The features of every photograph in each region, at one pass of the backbone for each view."""
    model = build_model(recipe.model, len(manifest.classes), task="contrast").eval()
    assert isinstance(model, FPCN)
    maps = frozen_features(model.backbone, _CPU, recipe.data.threads)
    configs = [recipe.model.changed(region=region) for region in regions]
    encode = Encoder(model, configs, precision="fp32", maps=lambda images: (maps(images), None))
    ids, views = np.arange(len(manifest.images)), recipe.data.distinct_views
    assert views is not None, "checked by main"
    drawn = ViewLoader(manifest, recipe.data, recipe.seed, ids.repeat(views), np.tile(np.arange(views), len(ids)), _CPU)
    blobs = [manifest.blob(image_id) for image_id in ids.tolist()]
    central = EvalLoader(blobs, manifest.labels, ids, recipe.data, rank=0, world_size=1, device=_CPU)

    def look(loader: EvalLoader, title: str) -> dict[str, Tensor]:
        table = torch.cat([encode(batch.images) for batch in track(loader, title, len(loader), transient=True)])
        columns = table.view(len(table), len(regions), -1)[..., :-1].unbind(1)
        return dict(zip(regions, columns, strict=True))

    drawn_views = {region: rows.view(len(ids), views, -1) for region, rows in look(drawn, "training views").items()}
    return Bank(drawn_views, look(central, "central views"))


def groups_of(features: Tensor) -> Ids:
    """[N] the group of each photograph: near-duplicates of near-duplicates are in one."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    unit = torch.nn.functional.normalize(features, dim=1)
    return connected_components(csr_array((unit @ unit.T >= ALIKE).numpy()), directed=False)[1]


def folds_of(groups: Ids, labels: Ids, folds: int, seed: int) -> Ids:
    """[N] the fold of each photograph: classes in equal shares, groups whole.

    Raises:
        UserError: there are fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    fold_N = np.empty(len(labels), dtype=np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    if (count := len(np.unique(groups))) < folds:
        reason = f"the {len(labels)} photographs are {count} groups of near-duplicates, which no fold may tear apart"
        raise UserError("--folds", folds, reason, "add other photographs, or name a pretrained backbone")
    for fold, (_, test) in enumerate(splitter.split(labels, labels, groups)):
        fold_N[test] = fold
    return fold_N


def train_head(recipe: Recipe, manifest: Manifest, views_NVC: Tensor, train: Ids, steps: int) -> Task:
    """A task whose head has learnt from the features of the photographs ``train``."""
    task = build_task(recipe.changed(**{"model.pretrained": False}), len(manifest.classes))
    task.model.backbone.freeze("backbone")
    task.train()
    optimizer = build_optimizer(recipe.optim, task)
    of_class = [train[manifest.labels[train] == label] for label in range(len(manifest.classes))]
    sampler = BalancedSampler(manifest.classes, of_class, recipe.data, recipe.seed)
    labels_N = torch.from_numpy(manifest.labels)
    for step in range(steps):
        ids, views = (torch.from_numpy(column) for column in sampler.batch(step))
        views %= views_NVC.shape[1]
        batch = Batch(ids.new_empty(len(ids), 3, 0, 0), labels_N[ids], ids, views, ids.new_empty(len(ids), 0))
        set_rate(optimizer, learning_rate(recipe.optim, step, steps, steps))
        optimizer.zero_grad()
        task.criterion(views_NVC[ids, views], batch, step).loss.backward()
        optimizer.step()
    return task.eval()


@torch.no_grad()
def predicted(task: Task, centre_NC: Tensor, ids: Ids) -> Ids:
    """The class of each photograph ``ids``."""
    return task.model.logits(centre_NC[ids]).argmax(1).numpy()


class Study:
    """All trainings of a backbone.

    Args:
        args: what to compare.
        recipe: of which all rows are variants.
        manifest: the photographs.
        bank: their features.
    """

    def __init__(self, args: Args, recipe: Recipe, manifest: Manifest, bank: Bank) -> None:
        self.args, self.recipe, self.manifest, self.bank = args, recipe, manifest, bank
        self.labels = manifest.labels
        group_N = groups_of(bank.centre["none"])
        self.groups = np.count_nonzero(np.bincount(group_N) > 1)
        self.fold_N = folds_of(group_N, self.labels, args.folds, recipe.seed)

    def part(self, *folds: int) -> Ids:
        """The photographs of some folds."""
        return np.flatnonzero(np.isin(self.fold_N, [fold % self.args.folds for fold in folds]))

    def train(self, row: Row, rate: float, seed: int, train: Ids) -> Task:
        changes = {**row.changes, "seed": seed, "optim.lr": rate, "model.region": row.region}
        recipe = self.recipe.changed(**changes)
        return train_head(recipe, self.manifest, self.bank.views[row.region], train, self.args.steps)

    def best_rate(self, row: Row) -> float:
        """The learning rate that does best on the second fold where the first is the test part."""
        fit, check = self.part(*range(2, self.args.folds)), self.part(1)
        found = {rate: predicted(self.train(row, rate, 0, fit), self.bank.centre[row.region], check) for rate in RATES}
        return max(RATES, key=lambda rate: float((found[rate] == self.labels[check]).mean()))

    def measure(self, row: Row) -> dict[str, Any]:
        """Accuracies [seeds] over all test folds, the balanced ones, and the seconds of one training."""
        rate, began = self.best_rate(row), time.perf_counter()
        accuracies, balanced = [], []
        for seed in range(self.args.seeds):
            found = np.empty_like(self.labels)
            for fold in range(self.args.folds):
                test = self.part(fold)
                task = self.train(row, rate, seed, self.part(*range(fold + 1, fold + self.args.folds)))
                found[test] = predicted(task, self.bank.centre[row.region], test)
            accuracies.append(float((found == self.labels).mean()))
            balanced.append(balanced_accuracy(self._confusion(found)))
        seconds = (time.perf_counter() - began) / self.args.seeds / self.args.folds
        return {"accuracies": accuracies, "balanced": balanced, "rate": rate, "seconds": seconds}

    def probe(self) -> dict[str, dict[str, Any]]:
        """Accuracy of each of the probe's classifiers over all test folds."""
        centre = self.bank.centre["none"].numpy()
        right, balanced = {}, {}
        for fold in range(self.args.folds):
            train = self.fold_N != fold
            for score in score_split(centre, self.labels, train, len(self.manifest.classes), self.recipe.seed):
                right.setdefault(score.classifier, []).append(score.accuracy * np.count_nonzero(~train))
                balanced.setdefault(score.classifier, []).append(score.balanced_accuracy)
        return {
            f"probe, {name}": {"accuracies": [sum(counts) / len(self.labels)], "balanced": [np.mean(balanced[name])]}
            for name, counts in right.items()
        }

    def _confusion(self, found: Ids) -> list[list[int]]:
        classes = len(self.manifest.classes)
        return np.bincount(self.labels * classes + found, minlength=classes**2).reshape(classes, classes).tolist()


def show(results: dict[str, dict[str, Any]], title: str) -> None:
    """Print accuracies as mean and standard deviation over the seeds."""
    table = Table(title=title, title_justify="left")
    for column in ("row", "accuracy %", "balanced %", "learning rate", "seconds a training"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, result in results.items():
        shown = [_spread(result[key]) for key in ("accuracies", "balanced")]
        rest = [f"{result[key]:.{digits}g}" if key in result else "-" for key, digits in (("rate", 1), ("seconds", 3))]
        table.add_row(name, *shown, *rest)
    Console(soft_wrap=True).print(table)


def _spread(shares: list[float]) -> str:
    mean = f"{100 * statistics.mean(shares):.1f}"
    return mean if len(shares) == 1 else f"{mean} ± {100 * statistics.stdev(shares):.1f}"


def run(args: Args) -> None:
    """Measure all rows, and show them."""
    if args.folds < 3:
        raise UserError("--folds", args.folds, "one is to test on, one to choose rates on, the rest to learn", "take 3")
    for name in ("seeds", "steps"):
        if (count := getattr(args, name)) < 1:
            raise UserError(f"--{name}", count, "there would be nothing to measure", "take 1 or more")
    if args.output is not None:  # known before the hour of work that it is for
        make_folder(args.output.parent)
        if args.output.is_dir():
            raise UserError("--output", args.output, "is a folder", "name a file in it")
    recipe = name_preprocessing(args.overrides)
    recipe = recipe.changed(
        **{"data.val_fraction": 0.0, "data.test_fraction": 0.0, "data.views": recipe.data.views or 4}
        | {"optim.name": "adamw", "optim.freeze": "backbone"}
    )
    use_threads(recipe.data.threads, _CPU)
    torch.manual_seed(recipe.seed)
    manifest = build_manifest(args.data.resolve(), recipe.data, recipe.seed)
    began = time.perf_counter()
    bank = compute(recipe, manifest, ["none", "threshold"])
    seconds = time.perf_counter() - began
    study = Study(args, recipe, manifest, bank)
    results = study.probe()
    chosen = rows(recipe.data.batch_size(len(manifest.classes)))
    for row in track(chosen, "heads", transient=True):
        results[row.name] = study.measure(row)
    images, views = len(manifest.images), bank.views["none"].shape[1]
    what = f"{recipe.model.backbone} at {recipe.data.crop} px, {images} photographs"
    how = f"{args.folds} folds, {args.seeds} seeds, {args.steps} steps, {study.groups} groups of near-duplicates"
    title = f"{what}, {how}; features of {views} + 1 views in {seconds:.0f} s on {usable_cores()} cores"
    show(results, title)
    if args.output is not None:
        write_text(args.output, json.dumps({"title": title, "rows": results}, indent=2) + "\n")


def main() -> None:
    command_line.run(lambda: run(command_line.parse(Args)))
