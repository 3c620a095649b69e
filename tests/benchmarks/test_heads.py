"""Heads on frozen features: folds, and the whole comparison at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import heads
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.errors import UserError

TINY = Recipe.model_validate(
    {
        "data": {"resize": 34, "crop": 32, "views": 2, "threads": 1, "classes_per_batch": None, "images_per_class": 4},
        "model": {"backbone": "test_resnet", "pretrained": False, "hidden": 8},
    }
)


def test_near_duplicates_of_near_duplicates_are_one_group() -> None:
    angles = torch.tensor([0.0, 0.25, 0.5, 2.0])  # cosines 0.97, 0.97; 0.88 between the first and the third
    features = 3 * torch.stack([angles.cos(), angles.sin()], dim=1)
    groups = heads.groups_of(features)
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_folds_hold_whole_groups_and_all_classes() -> None:
    labels = np.arange(60) % 3
    groups = np.where(np.arange(60) < 6, 0, np.arange(60))
    folds = heads.folds_of(groups, labels, 4, 0)
    assert len(set(folds[:6].tolist())) == 1 and set(folds.tolist()) == {0, 1, 2, 3}
    for fold in range(4):
        counts = np.bincount(labels[folds == fold], minlength=3)
        assert counts.min() >= 3 and counts.max() <= 7


@pytest.mark.parametrize("row", heads.rows(12), ids=lambda row: row.name)
def test_a_head_learns_what_can_be_told_apart(rocks: Path, row: heads.Row) -> None:
    manifest = build_manifest(rocks, TINY.data.changed(val_fraction=0.0, test_fraction=0.0), 0)
    recipe = TINY.changed(**row.changes, **{"model.region": row.region, "optim.name": "adamw", "optim.lr": 0.01})
    channels = heads.build_model(recipe.model, 3, task="contrast").backbone.channels
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(3, channels, generator=generator)
    noise = torch.rand(len(manifest.images), 2, channels, generator=generator)
    views = means[torch.from_numpy(manifest.labels)][:, None] + 0.2 * noise
    ids = np.arange(len(manifest.images))
    task = heads.train_head(recipe, manifest, views, ids[::2], 60)
    assert (heads.predicted(task, views.mean(1), ids[1::2]) == manifest.labels[1::2]).mean() > 0.9


@pytest.mark.slow
def test_every_row_is_measured(
    rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "ALIKE", 1.1)  # to a network that knows nothing all photographs are alike
    args = heads.Args(rocks, folds=3, seeds=2, steps=3, output=tmp_path / "heads.json", overrides=TINY)
    heads.run(args)
    found = json.loads((tmp_path / "heads.json").read_text())
    shown = capsys.readouterr().out
    assert "72 photographs, 3 folds, 2 seeds, 3 steps" in shown
    names = ["probe, logistic regression", "probe, nearest class mean", *(row.name for row in heads.rows(12))]
    assert list(found["rows"]) == names
    for row in heads.rows(12):
        result = found["rows"][row.name]
        assert len(result["accuracies"]) == 2 and result["rate"] in heads.RATES and result["seconds"] > 0
        assert all(0 <= share <= 1 for share in result["accuracies"] + result["balanced"])


def test_two_folds_leave_nothing_to_learn_from(rocks: Path) -> None:
    with pytest.raises(UserError, match="--folds 2: one is to test on"):
        heads.run(heads.Args(rocks, folds=2, overrides=TINY))


@pytest.mark.parametrize("change", [{"seeds": 0}, {"steps": 0}])
def test_nothing_to_measure(rocks: Path, change: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"--(seeds|steps) 0: there would be nothing to measure; take 1 or more"):
        heads.run(heads.Args(rocks, overrides=TINY, **change))


def test_an_output_that_is_a_folder_is_refused_before_the_work(rocks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        heads.run(heads.Args(rocks, overrides=TINY, output=tmp_path))


def test_photographs_that_are_all_alike_make_no_folds() -> None:
    with pytest.raises(UserError, match="--folds 5: the 6 photographs are 2 groups of near-duplicates"):
        heads.folds_of(np.array([0, 0, 0, 0, 0, 1]), np.zeros(6, dtype=np.int64), 5, 0)
