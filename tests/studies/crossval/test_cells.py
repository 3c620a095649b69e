"""A training of a head, and of a last stage, on features that were computed once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.models.fpcn import region_name
from fpcn_dist.recipe.schema import ModelConfig, Recipe
from fpcn_dist.runtime.files import write_tensors
from fpcn_dist.studies.crossval import cells, features, questions
from fpcn_dist.studies.crossval.cells import Cell
from fpcn_dist.studies.crossval.parts import cut
from fpcn_dist.studies.crossval.questions import OWN, READINGS, Row, rows_of
from fpcn_dist.tasks import build_task

TINY = Recipe.model_validate(
    {
        "data": {"resize": 68, "crop": 64, "views": 2, "threads": 1, "classes_per_batch": None, "images_per_class": 4}
        | {"val_fraction": 0.0, "test_fraction": 0.0},
        "model": {"backbone": "test_efficientnet", "pretrained": False, "hidden": 8, "region": "none"},
        "contrast": {"center_weight": 0.0},
        "optim": {"name": "adamw"},
    }
)
CHANNELS = 256
ROWS = {row.name: row for row in rows_of(questions.questions(None, 12, 4, 8))}
REGIONS = [TINY.model.changed(**way) for way in ({"region": "none"}, {"region": "threshold", "area_scale": False})]


class Study(NamedTuple):
    """A folder with photographs in parts, and a network's folder in it."""

    folder: Path
    network: Path
    manifest: Manifest

    def cell(self, row: Row, steps: int = 60) -> Cell:
        return Cell(self.network, TINY, row, 0.01, 0, 0, steps)


@pytest.fixture(scope="module")
def study(rocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    manifest = build_manifest(rocks, TINY.data, 0)
    manifest.save(folder / "manifest.json")
    cut(np.arange(len(manifest.images)), manifest.labels, 2, 0).save(folder, manifest)
    network = folder / "network"
    network.mkdir()
    return Study(folder, network, manifest)


@pytest.fixture(scope="module")
def separable(study: Study) -> Study:
    """The study with pooled vectors whose classes can be told apart."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(3, CHANNELS, generator=generator)
    count = len(study.manifest.images)
    noise = 0.2 * torch.rand(count, 3, CHANNELS, generator=generator)
    vectors = means[torch.from_numpy(study.manifest.labels)][:, None] + noise
    ways = ({"region": "none"}, {"region": "threshold", "area_scale": False}, {"region": "threshold"})
    tensors: dict[str, Tensor] = {}
    for way in ways:
        name = region_name(ModelConfig(**way))
        tensors |= {f"{name}, views": vectors[:, :2].contiguous(), f"{name}, centre": vectors[:, 2].contiguous()}
    write_tensors(study.network / features.POOLED, tensors, {})
    return study


def _accuracy(cell: Cell, manifest: Manifest, reading: str = OWN) -> float:
    with safe_open(cell.path, "np") as file:
        found = file.get_tensor(f"{reading}, test")
    assert found.sum(1) == pytest.approx(1, abs=1e-5)
    return float((found.argmax(1) == manifest.labels[cells._photographs(cell.folder.parent)[1].test(cell.fold)]).mean())


@pytest.mark.parametrize(
    "name",
    [
        *("logistic regression", "linear head", "linear head, label smoothing 0.1", "FPCN, all pairs"),
        *("FPCN, each image with itself", "FPCN, half of the loss on the image with itself"),
        *("FPCN, gates on the hardest pairs", "FPCN, mask, centre, alpha", "FPCN, random, 24 pairs"),
        *("FPCN, shifts, 24 pairs", "FPCN, all pairs of all training images"),
    ],
)
def test_a_head_learns_what_can_be_told_apart(separable: Study, name: str) -> None:
    cell = separable.cell(ROWS[name])
    cells.measure(cell, 1)
    assert _accuracy(cell, separable.manifest) > 0.9


def test_what_was_trained_on_pairs_is_read_in_every_way(separable: Study) -> None:
    cell = separable.cell(ROWS["FPCN, all pairs"])._replace(seed=1)
    cells.measure(cell, 1)
    assert all(_accuracy(cell, separable.manifest, reading) > 0.6 for reading in READINGS)


def test_a_photograph_beside_itself_is_read_as_trained(separable: Study) -> None:
    torch.manual_seed(0)
    model = build_task(TINY, 3).model.eval()
    vectors = torch.rand(5, model.backbone.channels)
    with torch.no_grad():
        alone = torch.cat([cells._beside(model, vector[None], vector[None]) for vector in vectors])
        torch.testing.assert_close(alone, model.logits(vectors))
        others = torch.rand(3, model.backbone.channels)
        each = torch.stack([cells._beside(model, vectors, other[None]) for other in others])
        torch.testing.assert_close(cells._beside(model, vectors, others), each.mean(0))


def test_the_last_stage_sees_what_the_network_would(study: Study) -> None:
    features.write_maps(study.network, TINY, study.manifest)
    row = ROWS["FPCN, mask, centre, alpha, last stage"]
    task = build_task(study.cell(row).settled, 3).eval()
    shown = cells._LastStage(study.cell(row), task).eval()
    ids = np.arange(6)
    loader = features.EvalLoader(
        [study.manifest.blob(i) for i in ids.tolist()], study.manifest.labels, ids, TINY.data,
        rank=0, world_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    # The weights of a row are drawn by its seed, those of the maps by the recipe's: here the two are one.
    with torch.no_grad():
        expected = torch.cat([task.model.pool(batch.images).pooled for batch in loader])
        torch.testing.assert_close(shown.central(ids), expected, atol=2e-3, rtol=2e-3)


def test_only_the_last_stage_and_the_head_learn(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    features.write_maps(study.network, TINY, study.manifest)
    cell = study.cell(ROWS["plain, last stage"], steps=3)
    built = []
    monkeypatch.setattr(cells, "build_task", lambda *args: built.append(build_task(*args)) or built[-1])
    cells.measure(cell, 1)
    before = build_task(cell.settled, 3).state_dict()
    changed = {name for name, tensor in built[0].state_dict().items() if not torch.equal(tensor, before[name])}
    stage, _ = cells.split_last_stage(built[0].model.backbone, 64)
    frozen = {id(p) for p in stage.parameters()}
    learnt = {name for name, p in built[0].named_parameters() if id(p) not in frozen}
    assert {name for name in changed if name in dict(built[0].named_parameters())} == learnt
    optimizer = cells.build_optimizer(cell.settled.optim, built[0])
    rates = {group["lr_scale"] * cell.settled.optim.lr for group in optimizer.param_groups}
    assert sorted(rates) == pytest.approx([0.001, 0.01])


def test_what_is_there_is_not_trained_again(separable: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = separable.cell(ROWS["linear head"])._replace(seed=1)
    cells.measure(cell, 1)
    first = cell.path.read_bytes()
    monkeypatch.setattr(cells, "_train", None)
    cells.measure(cell, 1)
    monkeypatch.undo()
    assert cell.path.read_bytes() == first
    with safe_open(cell.path, "np") as file:
        before = file.get_tensor(f"{OWN}, test")
    cell.path.unlink()
    cells.measure(cell, 1)
    with safe_open(cell.path, "np") as file:
        assert np.array_equal(file.get_tensor(f"{OWN}, test"), before)
