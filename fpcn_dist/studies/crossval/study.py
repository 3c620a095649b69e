"""A study from beginning to end: features of every network, one training a cell, tables and figures.

Finished trainings stay in the output folder: the same command, given again, goes on with those that are missing, and
more questions and seeds may come to it.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.notices import show_notices
from fpcn_dist.models import build_model
from fpcn_dist.models.fpcn import region_name
from fpcn_dist.recipe.schema import ModelConfig, Recipe
from fpcn_dist.recipe.section import flat, truth
from fpcn_dist.runs.description import describe
from fpcn_dist.runs.probe import require_scikit_learn
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.cores import usable_cores
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder
from fpcn_dist.runtime.lock import locked
from fpcn_dist.runtime.names import file_stem
from fpcn_dist.runtime.ranks import use_threads
from fpcn_dist.studies.cluster.connection import interruptible, told_to_stop
from fpcn_dist.studies.crossval import questions
from fpcn_dist.studies.crossval.cells import Cell, measure
from fpcn_dist.studies.crossval.features import pooled_of, write_maps, write_pooled
from fpcn_dist.studies.crossval.parts import Ids, Parts, cut, groups_of
from fpcn_dist.studies.crossval.questions import RATES, Question, Row, rows_of
from fpcn_dist.studies.crossval.results import StudyResults, best_rate, collect
from fpcn_dist.studies.crossval.tables import save_results
from fpcn_dist.training.feature_bank.encoder import weights_hash
from fpcn_dist.training.pretrained import name_preprocessing

STUDY_FILE = "study.json"


@dataclasses.dataclass(frozen=True)
class StudyRequest:
    """What is to be studied.

    Attributes:
        recipe: of which all trainings are variants.
        networks: weights (``model.pretrained``) by backbone.
        only: keys of questions, separated by commas; ``None``: all.
        folds: test parts.
        seeds: trainings of a head on each fold.
        stage_seeds: trainings of a last stage on each fold.
        steps: updates of a training.
    """

    recipe: Recipe
    networks: dict[str, bool | str]
    only: str | None
    folds: int
    seeds: int
    stage_seeds: int
    steps: int


def parse_networks(text: str) -> dict[str, bool | str]:
    """Weights by backbone from ``--networks``: NAME or NAME=WEIGHTS, separated by commas.

    Raises:
        UserError: a name is empty, or given twice.
    """
    found: dict[str, bool | str] = {}
    for word in text.split(","):
        name, _, given = word.strip().partition("=")
        if not name or name in found:
            reason = "names a network twice" if name else "names no network"
            raise UserError("--networks", text, reason, "write NAME=WEIGHTS, separated by commas")
        weights = truth(given) if given else True
        assert isinstance(weights, (bool, str))
        found[name] = weights
    return found


def run_study(request: StudyRequest, data: Address, output: Path) -> StudyResults:
    """Train what the questions need and is not there yet; leave results, tables and figures in ``output``.

    Raises:
        UserError: the request, the data or the folder do not fit; names what does not.
    """
    for name, least in (("folds", 2), ("seeds", 1), ("stage_seeds", 1), ("steps", 1)):
        if (count := getattr(request, name)) < least:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(flag, count, "leaves nothing to measure", f"take {least} or more")
    require_scikit_learn()
    recipes = {network: _recipe(request, network) for network in request.networks}
    base = next(iter(recipes.values()))
    manifest = build_manifest(data.resolve(), base.data, base.seed)
    show_notices(manifest.refused, manifest.notices)
    output = output.resolve()
    make_folder(output)
    with told_to_stop(), locked(output), interruptible():
        return _run(request, recipes, manifest, output)


def _recipe(request: StudyRequest, network: str) -> Recipe:
    """The study's recipe with one of its networks."""
    given = request.recipe
    changes = {"model.backbone": network, "model.pretrained": request.networks[network], "task": "contrast"}
    parts = {"data.val_fraction": 0.0, "data.test_fraction": 0.0, "data.views": given.data.views or 4}
    return name_preprocessing(given.changed(**changes, **parts))


def _run(request: StudyRequest, recipes: dict[str, Recipe], manifest: Manifest, output: Path) -> StudyResults:
    base = next(iter(recipes.values()))
    use_threads(base.data.threads, torch.device("cpu"))
    # Asked for here, to refuse an unknown question before the features are computed.
    questions.questions(request.only, 2, 1, 2)
    names = ("folds", "steps")
    now = {"data": manifest.hash, **{name: getattr(request, name) for name in names}}
    now |= {f"weights of {network}": _weights(recipe) for network, recipe in recipes.items()}
    now |= flat(request.recipe.model_dump(mode="json"))
    describe(output, STUDY_FILE, now, "a study", free={"data.threads"})
    manifest.save(output / "manifest.json")
    folders = {network: output / file_stem(network) for network in recipes}
    regions = _regions(base)
    for network, recipe in recipes.items():
        folders[network].mkdir(exist_ok=True)
        write_pooled(folders[network], recipe, manifest, regions)
    parts = _parts(output, manifest, list(folders.values()), request.folds, base.seed)
    chosen = _questions(request, base, manifest, parts)
    if any(row.depth == "stage" for row in rows_of(chosen)):
        for network, recipe in recipes.items():
            write_maps(folders[network], recipe, manifest)
    trained = {
        network: _train(request, folders[network], recipe, rows_of(chosen), manifest.labels[parts.validation])
        for network, recipe in recipes.items()
    }
    results = collect(trained, chosen, manifest, parts, request.steps)
    save_results(output, results)
    return results


def _weights(recipe: Recipe) -> str:
    torch.manual_seed(recipe.seed)  # of a network without weights
    return weights_hash(build_model(recipe.model, 2, task="classify").backbone)


def _regions(recipe: Recipe) -> list[ModelConfig]:
    """Every way to pool of any row."""
    settings = ({"region": "none"}, {"region": "threshold", "area_scale": False}, {"region": "threshold"})
    return [recipe.model.changed(**setting) for setting in settings]


def _parts(output: Path, manifest: Manifest, folders: Sequence[Path], folds: int, seed: int) -> Parts:
    """The same for all networks: near-duplicates to all of them together."""
    none = region_name(ModelConfig(region="none"))
    vectors = [torch.nn.functional.normalize(pooled_of(folder, none)[1], dim=1) for folder in folders]
    parts = cut(groups_of(torch.cat(vectors, dim=1)), manifest.labels, folds, seed)
    parts.save(output, manifest)
    return parts


def _questions(request: StudyRequest, base: Recipe, manifest: Manifest, parts: Parts) -> tuple[Question, ...]:
    classes = len(manifest.classes)
    counts = [np.bincount(manifest.labels[parts.train(fold)], minlength=classes).min() for fold in range(parts.folds)]
    batch, images = base.data.batch_size(classes), base.data.images_per_class
    assert images is not None, "or there is no size of a batch"
    return questions.questions(request.only, batch, images, int(min(counts)))


def _train(
    request: StudyRequest, folder: Path, recipe: Recipe, rows: Sequence[Row], labels: Ids
) -> dict[str, list[Cell]]:
    """Train the cells of a network that are missing: first those that choose rates, then all with the best.

    Args:
        request: the study's.
        folder: of the network.
        recipe: with the network.
        rows: what to train.
        labels: of the validation photographs.

    Returns:
        The cells at the best rate of each row, by its name.
    """
    name, steps = recipe.model.backbone, request.steps
    choosing = {row.name: [Cell(folder, recipe, row, rate, 0, 0, steps) for rate in RATES[row.depth]] for row in rows}
    _measure([cell for cells in choosing.values() for cell in cells], f"{name}: learning rates")
    trained = {}
    for row in rows:
        rate, seeds = best_rate(choosing[row.name], labels), _seeds(request, row)
        trained[row.name] = [
            Cell(folder, recipe, row, rate, seed, fold, steps)
            for seed, fold in itertools.product(range(seeds), range(request.folds))
        ]
    _measure([cell for cells in trained.values() for cell in cells], f"{name}: trainings")
    return trained


def _seeds(request: StudyRequest, row: Row) -> int:
    return row.seeds or (request.stage_seeds if row.depth == "stage" else request.seeds)


def _measure(wanted: Sequence[Cell], title: str) -> None:
    """Train the missing of some cells, as many at a time as the cores allow; a line for each row that is complete."""
    from joblib import Parallel, delayed

    missing = [cell for cell in wanted if not cell.path.is_file()]
    if not missing:
        return
    print(f"{title}: {len(missing)} of {len(wanted)} to do", flush=True)
    threads = missing[0].recipe.data.threads or 1
    left = Counter(cell.row.name for cell in missing)
    jobs = Parallel(max(1, usable_cores() // threads), return_as="generator")
    with warnings.catch_warnings():
        # joblib renews a process whose memory has grown, as it does where it maps the features.
        warnings.filterwarnings("ignore", "A worker stopped", UserWarning)
        for cell, _ in zip(missing, jobs(delayed(measure)(cell, threads) for cell in missing), strict=True):
            left[cell.row.name] -= 1
            if not left[cell.row.name]:
                print(f"  {cell.row.name}", flush=True)
