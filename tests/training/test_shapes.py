"""A training, its evaluation, a probe and a teacher's bank on the same photographs in any shape: the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.models import build_backbone
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.finish import evaluate_run
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.training.loop import train
from fpcn_dist.training.probe import centre_features
from fpcn_dist.training.soft_labels.bank import prepare_bank
from fpcn_dist.training.soft_labels.teacher import name_teacher, open_teacher
from tests.helpers.distilling import ALONE, CPU, make_teacher, recipe
from tests.helpers.shapes import SHAPES


class _Made(NamedTuple):
    """What was computed from the images of a data set."""

    model: bytes
    evaluation: Evaluation | None
    features: torch.Tensor
    bank: bytes


def _make(data: Path, chosen: Recipe, labelled: Recipe, output: Path) -> _Made:
    run = RunFolder(output / "run")
    train(chosen, data, run.path, ALONE)
    manifest = build_manifest(data, labelled.data, labelled.seed)
    bank = prepare_bank(output / "bank", labelled, manifest)
    bank.write(open_teacher(labelled, manifest, CPU), share=0, shares=1, device=CPU)
    torch.manual_seed(0)
    features = centre_features(build_backbone("test_resnet"), manifest, manifest.ids("val"), chosen, CPU)
    logits = (output / "bank" / "logits.f32").read_bytes()
    return _Made(
        (run.path / "model.safetensors").read_bytes(), Evaluation.load(run.path), torch.tensor(features), logits
    )


@pytest.fixture(scope="module")
def chosen() -> Recipe:
    return recipe("classify", train={"epochs": 1})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """With a teacher."""
    teacher = make_teacher(tmp_path_factory.mktemp("teacher") / "teacher")
    return name_teacher(recipe(distill={"teacher": str(teacher)}, data={"views": 1}))


@pytest.fixture(scope="module")
def expected(rocks: Path, chosen: Recipe, labelled: Recipe, tmp_path_factory: pytest.TempPathFactory) -> _Made:
    """What comes of the folder."""
    return _make(rocks, chosen, labelled, tmp_path_factory.mktemp("folder"))


@pytest.mark.parametrize("shape", ["csv", "tar", "parquet"])
@pytest.mark.slow
def test_any_shape_gives_what_the_folder_gives(
    shape: str,
    rocks: Path,
    chosen: Recipe,
    labelled: Recipe,
    expected: _Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "data").mkdir()
    data = SHAPES[shape](rocks, tmp_path / "data")
    made = _make(data, chosen, labelled, tmp_path)
    assert made.model == expected.model and made.evaluation == expected.evaluation
    assert torch.equal(made.features, expected.features) and made.bank == expected.bank

    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = tmp_path / "moved" / data.relative_to(tmp_path / "data")
    run = RunFolder(tmp_path / "run")
    assert evaluate_run(run, ALONE, data=moved) == expected.evaluation
    longer = chosen.changed(**{"train.epochs": chosen.train.epochs + 1})
    train(longer, moved, run.path, ALONE, extend=True)
    assert "resuming from step" in capsys.readouterr().out
