"""Near-duplicates stay together, and classes are dealt out in equal shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.crossval.parts import Parts, cut, groups_of


def test_near_duplicates_of_near_duplicates_are_one_group() -> None:
    angles = torch.tensor([0.0, 0.25, 0.5, 2.0])  # cosines 0.97, 0.97; 0.88 between the first and the third
    groups = groups_of(3 * torch.stack([angles.cos(), angles.sin()], dim=1))
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_parts_hold_whole_groups_and_all_classes() -> None:
    labels = np.arange(60) % 3
    parts = cut(np.where(np.arange(60) < 6, 0, np.arange(60)), labels, 3, 0)
    assert len(set(parts.part_N[:6].tolist())) == 1
    for part in (*map(parts.test, range(3)), parts.validation):
        counts = np.bincount(labels[part], minlength=3)
        assert counts.min() >= 3 and counts.max() <= 7
    for fold in range(3):
        together = np.concatenate([parts.test(fold), parts.train(fold), parts.validation])
        assert sorted(together.tolist()) == list(range(60))
    assert sorted(parts.tested.tolist()) == sorted(set(range(60)) - set(parts.validation.tolist()))


def test_parts_are_read_as_they_were_written(rocks: Path, tmp_path: Path) -> None:
    manifest = build_manifest(rocks, DataConfig(), 0)
    parts = cut(np.arange(len(manifest.images)) // 2, manifest.labels, 3, 0)
    parts.save(tmp_path, manifest)
    read = Parts.load(tmp_path)
    assert read.folds == 3
    assert np.array_equal(read.group_N, parts.group_N) and np.array_equal(read.part_N, parts.part_N)


def test_photographs_that_are_all_alike_make_no_folds() -> None:
    with pytest.raises(UserError, match="--folds 2: the 6 photographs are 2 groups of near-duplicates"):
        cut(np.array([0, 0, 0, 0, 0, 1]), np.zeros(6, dtype=np.int64), 2, 0)
