"""One training of the study, and what it makes of the photographs that it did not learn from.

Legend: B images of a batch, C channels, n photographs to classify, K classes.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.sampler import BalancedSampler, WholeSampler
from fpcn_dist.models import FPCN
from fpcn_dist.models.fpcn import region_name
from fpcn_dist.models.modes import autocast
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.probe import fit_logistic
from fpcn_dist.runtime.files import write_tensors
from fpcn_dist.runtime.names import file_stem
from fpcn_dist.runtime.ranks import use_threads
from fpcn_dist.studies.crossval.features import maps_of, pooled_of
from fpcn_dist.studies.crossval.parts import Ids, Parts
from fpcn_dist.studies.crossval.questions import (
    BACKBONE_RATE,
    CLASS_MEANS,
    OWN,
    PLAIN_VECTOR,
    TRAINING_IMAGES,
    Row,
)
from fpcn_dist.studies.crossval.stages import split_last_stage
from fpcn_dist.tasks import Task, build_task
from fpcn_dist.training.engine.optim import build_optimizer, learning_rate, set_rate

COMPANIONS = 42
"""Training images that a photograph is paired with where it is classified by training images."""
_CPU = torch.device("cpu")
_CHUNK = 256
"""Central views that the last stage is shown at once."""


class Cell(NamedTuple):
    """One training.

    Attributes:
        folder: of a network in the study's output.
        recipe: of the study, with this network.
        row: what is trained.
        rate: peak learning rate of the head.
        seed: of initial weights, batches and dropout.
        fold: the test part.
        steps: updates.
    """

    folder: Path
    recipe: Recipe
    row: Row
    rate: float
    seed: int
    fold: int
    steps: int

    @property
    def path(self) -> Path:
        """The file of what it reached."""
        name = f"rate-{self.rate:g}-seed-{self.seed}-fold-{self.fold}.safetensors"
        return self.folder / "cells" / file_stem(self.row.name) / name

    @property
    def settled(self) -> Recipe:
        """The study's recipe with all that this training changes."""
        rates = {"optim.lr": self.rate or 1.0, "optim.head_lr": 1.0}
        if self.row.depth == "stage":  # the rate of a recipe is the backbone's
            rates = {"optim.lr": self.rate * BACKBONE_RATE, "optim.head_lr": 1 / BACKBONE_RATE}
        return self.recipe.changed(**self.row.changes, **rates, seed=self.seed)


@functools.lru_cache(maxsize=2)
def _photographs(study: Path) -> tuple[Manifest, Parts]:
    manifest = Manifest.load(study / "manifest.json")
    return manifest, Parts.load(study)


def measure(cell: Cell, threads: int) -> None:
    """Train ``cell`` and write its probabilities [n, K] of the test and the validation photographs, for each reading.

    What is there already stays. The metadata of the file say how many seconds of CPU time the training took and, of
    FPCN, how far the gates of single images are from 1 (the mean absolute difference over validation photographs).
    """
    if cell.path.is_file():
        return
    use_threads(threads, _CPU)
    logging.getLogger("fpcn_kernels").setLevel(logging.ERROR)  # that no GPU is there, the first pass has said
    manifest, parts = _photographs(cell.folder.parent)
    began = time.process_time()
    classify, about = (_probe if cell.row.depth == "probe" else _train)(cell, manifest, parts)
    about["seconds"] = time.process_time() - began
    shown = {"test": parts.test(cell.fold), "validation": parts.validation}
    found = {f"{how}, {part}": classify(how, ids) for how in cell.row.readings for part, ids in shown.items()}
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(cell.path, found, {"about": json.dumps(about)})


Classify = Callable[[str, Ids], Tensor]


def _probe(cell: Cell, manifest: Manifest, parts: Parts) -> tuple[Classify, dict[str, float]]:
    _, centre = pooled_of(cell.folder, region_name(cell.recipe.model.changed(region="none")))
    train = parts.train(cell.fold)
    fitted = fit_logistic(centre[train].numpy(), manifest.labels[train], cell.seed)

    def classify(_: str, ids: Ids) -> Tensor:
        found = torch.zeros(len(ids), len(manifest.classes))
        predicted = torch.from_numpy(fitted.predict_proba(centre[ids].numpy()))
        found[:, torch.from_numpy(fitted.classes_)] = predicted.float()
        return found

    return classify, {}


def _train(cell: Cell, manifest: Manifest, parts: Parts) -> tuple[Classify, dict[str, float]]:
    recipe, train = cell.settled, parts.train(cell.fold)
    if cell.row.depth == "head":
        recipe = recipe.changed(**{"model.pretrained": False, "optim.freeze": "backbone"})
    task = build_task(recipe, len(manifest.classes))
    shown = _Pooled(cell, task) if cell.row.depth == "head" else _LastStage(cell, task)
    optimizer = build_optimizer(recipe.optim, task)
    sampler = _sampler(recipe, manifest, train)
    labels = torch.from_numpy(manifest.labels)
    task.train()
    shown.train()
    for step in range(cell.steps):
        ids, views = (torch.from_numpy(column) for column in sampler.batch(step))
        batch = Batch(ids.new_empty(len(ids), 3, 0, 0), labels[ids], ids, views, ids.new_empty(len(ids), 0))
        set_rate(optimizer, learning_rate(recipe.optim, step, cell.steps, cell.steps))
        optimizer.zero_grad()
        _loss(task, shown(ids, views), batch, step, cell.row.self_share).backward()
        optimizer.step()
    task.eval()
    shown.eval()
    with torch.no_grad():
        return _classifier(task, shown, train, labels), _gates(task, shown.central(parts.validation))


def _sampler(recipe: Recipe, manifest: Manifest, train: Ids) -> BalancedSampler | WholeSampler:
    if recipe.data.images_per_class is None:
        return WholeSampler(train, len(manifest.classes), recipe.seed)
    of_class = [train[manifest.labels[train] == label] for label in range(len(manifest.classes))]
    return BalancedSampler(manifest.classes, of_class, recipe.data, recipe.seed)


def _loss(task: Task, pooled: Tensor, batch: Batch, step: int, self_share: float) -> Tensor:
    loss = pooled.new_zeros(())
    if self_share < 1:
        loss = loss + (1 - self_share) * task.criterion(pooled, batch, step).loss
    if self_share:
        loss = loss + self_share * task.class_loss(task.model.logits(pooled), batch.labels)
    return loss


class _Pooled(nn.Module):
    """Pooled vectors [B, C] of views, looked up."""

    def __init__(self, cell: Cell, task: Task) -> None:
        super().__init__()
        task.model.backbone.freeze("backbone")
        self._views, self._centre = pooled_of(cell.folder, task.model.region)

    def forward(self, ids: Tensor, views: Tensor) -> Tensor:
        return self._views[ids, views % self._views.shape[1]]

    def central(self, ids: Ids) -> Tensor:
        return self._centre[ids]


class _LastStage(nn.Module):
    """Pooled vectors [B, C] of views, by the last stage of what comes before it."""

    def __init__(self, cell: Cell, task: Task) -> None:
        super().__init__()
        before, self._stage = split_last_stage(task.model.backbone, cell.recipe.data.crop)
        before.requires_grad_(False)
        self._stage.to(memory_format=torch.channels_last)
        self._model = [task.model]  # not a module of this one, which would be trained twice
        self._views, self._centre = maps_of(cell.folder)
        self._precision = cell.recipe.train.precision

    def forward(self, ids: Tensor, views: Tensor) -> Tensor:
        return self._pooled(self._views[ids, views % self._views.shape[1]])

    def central(self, ids: Ids) -> Tensor:
        return torch.cat([self._pooled(self._centre[part]) for part in torch.from_numpy(ids).split(_CHUNK)])

    def _pooled(self, maps: Tensor) -> Tensor:
        maps = maps.float().contiguous(memory_format=torch.channels_last)
        with autocast(maps.device, self._precision):
            features = self._stage(maps)
        return self._model[0].pool_maps(features).pooled.float()


def _classifier(task: Task, shown: _Pooled | _LastStage, train: Ids, labels: Tensor) -> Classify:
    """How the trained network classifies photographs, by reading."""
    model = task.model

    @torch.no_grad()
    def classify(reading: str, ids: Ids) -> Tensor:
        pooled = shown.central(ids)
        if reading == OWN:
            return model.logits(pooled).softmax(1)
        if reading == PLAIN_VECTOR:
            return model.classifier(pooled).softmax(1)
        known = shown.central(train)
        if reading == CLASS_MEANS:
            others = torch.stack([known[labels[train] == label].mean(0) for label in labels.unique()])
        else:
            assert reading == TRAINING_IMAGES
            chosen = np.random.default_rng(0).choice(len(train), min(COMPANIONS, len(train)), replace=False)
            others = known[torch.from_numpy(chosen)]
        return _beside(model, pooled, others).softmax(1)

    return classify


def _beside(model: nn.Module, pooled: Tensor, others: Tensor) -> Tensor:
    """Mean logits [n, K] of images as the first of their pairs with each of the vectors ``others`` (eq. 6, 8, 9)."""
    assert isinstance(model, FPCN)
    total = torch.zeros(len(pooled), model.classifier.out_features)
    for other in others:
        total += model.classifier(model.fuse(pooled, other.expand_as(pooled)) * pooled)
    return total / len(others)


def _gates(task: Task, pooled: Tensor) -> dict[str, float]:
    """How far X_f of single images is from 1, where a network multiplies by it."""
    model = task.model
    if not isinstance(model, FPCN) or model.config.head != "product":
        return {}
    return {"departure": float((model.fuse(pooled, pooled) - 1).abs().mean())}
