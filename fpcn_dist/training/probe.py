"""The probe of a backbone on a folder of photographs, and of a run's own backbone before its first step.

Shape legend: B images of a batch, N images, C channels and h x w cells of the feature map.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.notices import show_notices
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.deploy.onnx_backbone import frozen_features
from fpcn_dist.models import Backbone, build_backbone
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.probe import (
    PROBE_FILE,
    Features,
    Probe,
    require_folds,
    require_scikit_learn,
    score_folds,
    score_split,
)
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder
from fpcn_dist.runtime.ranks import use_threads
from fpcn_dist.runtime.terminal import Terminal
from fpcn_dist.training.pretrained import name_preprocessing
from fpcn_dist.training.run import TrainingRun

MOST_IMAGES = 20_000
"""Of data with more, a run computes no probe: its other ranks would wait for hours where a backbone is large."""


def centre_features(
    backbone: Backbone, manifest: Manifest, ids: NDArray[np.int64], recipe: Recipe, device: torch.device
) -> Features:
    """Features [N, C] of the central views of ``ids``, each the mean over the whole map, of a backbone as it is now.

    Raises:
        UserError: an image cannot be read.
    """
    blobs = [manifest.blob(image_id) for image_id in ids.tolist()]
    loader = EvalLoader(blobs, manifest.labels[ids], ids, recipe.data, rank=0, world_size=1, device=device)
    extract = frozen_features(backbone, device, recipe.data.threads, images=len(ids))
    batches = track(loader, "features", len(loader), console=Console(), transient=True)
    return np.concatenate([extract(batch.images).mean((2, 3)).float().cpu().numpy() for batch in batches])


def probe_backbone(
    backbone: Backbone, recipe: Recipe, manifest: Manifest, device: torch.device, *, folds: int = 0
) -> Probe:
    """Fit the probe's classifiers to the training images and score them on the test (else validation) images.

    Args:
        backbone: the network, on ``device``; it stays as it is.
        recipe: names the network, and gives sizes, threads and seed.
        manifest: the images.
        device: where the features are computed.
        folds: of a cross-validation over all images instead; 0: none.

    Raises:
        UserError: scikit-learn is missing, there is nothing to score on, an image cannot be read, or a class has fewer
            images than there are folds.
    """
    require_scikit_learn()
    split = "all" if folds else next((name for name in ("test", "val") if len(manifest.ids(name))), None)
    if split is None:
        reason = "the data have no validation or test images"
        raise UserError("data.val_fraction", recipe.data.val_fraction, reason, "raise it")
    train = manifest.ids("train")
    ids = np.arange(len(manifest.images)) if folds else np.concatenate([train, manifest.ids(split)])
    labels, classes, seed = manifest.labels[ids], manifest.classes, recipe.seed
    if folds:
        require_folds(folds, labels, classes)  # before the features, which take longer
    features = centre_features(backbone, manifest, ids, recipe, device)
    if folds:
        scores = score_folds(features, labels, folds, len(classes), seed)
    else:
        scores = score_split(features, labels, np.arange(len(ids)) < len(train), len(classes), seed)
    return Probe(
        backbone=recipe.model.backbone,
        pretrained=recipe.model.pretrained,
        manifest=manifest.hash,
        pixels=recipe.data.pixels(),
        split=split,
        folds=folds,
        training=len(ids) - len(ids) // folds if folds else len(train),
        images=len(ids) if folds else len(ids) - len(train),
        scores=scores,
    )


def probe_folder(
    recipe: Recipe, data: Address, device: torch.device, *, folds: int = 0, output: Path | None = None
) -> Probe:
    """Probe the backbone that a recipe names, print a table, and write probe.json to ``output`` where that is given.

    Nothing is trained: batches may be of any composition.

    Raises:
        UserError: the data cannot be used; see :func:`probe_backbone` and :func:`fpcn_dist.models.build_backbone`.
    """
    if folds and folds < 2:
        raise UserError("--folds", folds, "each image is classified by what the other folds teach", "take 2 or more")
    require_scikit_learn()
    use_threads(recipe.data.threads, device)
    recipe = name_preprocessing(recipe).changed(**{"data.classes_per_batch": None, "data.images_per_class": 1})
    manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
    show_notices(manifest.refused, manifest.notices)
    torch.manual_seed(recipe.seed)  # where nothing is pretrained
    backbone = build_backbone(recipe.model.backbone, pretrained=recipe.model.pretrained)
    probe = probe_backbone(backbone, recipe, manifest, device, folds=folds)
    _show(probe)
    if output is not None:
        make_folder(output)
        probe.save(output)
        Terminal().print(f"Wrote {output / PROBE_FILE}.")
    return probe


def probe_run(training: TrainingRun) -> None:
    """Leave the probe of a run's own pretrained backbone in its folder, before the first step. Collective.

    One that is there already, of the same network, weights, images and pixels, stays. What stands in the way is
    printed: no run fails for lack of a probe.
    """
    recipe, manifest, folder = training.recipe, training.manifest, training.run.path
    if training.first_step:
        return
    if not recipe.model.pretrained:
        training.ranks.on_first(lambda: (folder / PROBE_FILE).unlink(missing_ok=True))
        return
    # On all ranks, and where a probe is there, too: it may average what rounding has left different.
    backbone = training.engine.evaluation_model().backbone
    compute = functools.partial(_probe_run, backbone, recipe, manifest, folder, training.ranks.device)
    training.ranks.on_first(compute)


def _probe_run(backbone: Backbone, recipe: Recipe, manifest: Manifest, folder: Path, device: torch.device) -> None:
    try:
        found = Probe.load(folder)
    except UserError:
        found = None
    wanted = (recipe.model.backbone, recipe.model.pretrained, manifest.hash, recipe.data.pixels(), 0)
    if found and (found.backbone, found.pretrained, found.manifest, found.pixels, found.folds) == wanted:
        return
    (folder / PROBE_FILE).unlink(missing_ok=True)
    try:
        if len(manifest.images) > MOST_IMAGES:
            reason = f"more than the {MOST_IMAGES:,} that a run waits for"
            raise UserError("images", f"{len(manifest.images):,}", reason, "launch/probe.py computes it")
        probe = probe_backbone(backbone, recipe, manifest, device)
    except UserError as error:
        print(f"no probe of the backbone: {error}", flush=True)
        return
    _show(probe)
    probe.save(folder)


def _show(probe: Probe) -> None:
    on = f"{probe.images} {probe.split} images, fitted to {probe.training}"
    on = f"{probe.images} images in {probe.folds} folds" if probe.folds else on
    title = f"The bar to beat: frozen {probe.backbone} at {probe.size} px, {on}"
    table = Table(title=title, title_justify="left")
    for column in ("classifier", "accuracy", "95 % interval", "balanced accuracy", "C"):
        table.add_column(column, justify="left" if column == "classifier" else "right")
    for score in probe.scores:
        accuracy, low, high, balanced = (
            f"{100 * share:.1f} %" for share in (score.accuracy, score.low, score.high, score.balanced_accuracy)
        )
        chosen = "-" if score.C is None else f"{score.C:g}"
        table.add_row(score.classifier, accuracy, f"{low} to {high}", balanced, chosen)
    Terminal().print(table)
