"""Mixup and cutmix: against their equations in float64, pure in (seed, step), and the same for any number of ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.data.mixing import Mixture, mix, mixture
from fpcn_dist.recipe.augment import AugmentConfig
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("how", [Mixture(0.3, None), Mixture(1 - 6 / 40, (1, 2, 4, 4)), Mixture(1.0, (2, 2, 2, 2))])
def test_mixtures_are_their_equations(how: Mixture) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 3, 5, 8, generator=generator), torch.tensor([0, 1, 2, 0, 1, 1])
    mixed, targets = mix(images, labels, 4, how)
    for i in range(6):
        j = i + 1 if i % 2 == 0 else i - 1
        own, other = images[i].double(), images[j].double()
        kept = torch.full((5, 8), how.share, dtype=torch.float64)
        if how.box is not None:
            top, left, bottom, right = how.box
            kept = torch.ones(5, 8, dtype=torch.float64)
            kept[top:bottom, left:right] = 0
            assert kept.mean().item() == pytest.approx(how.share)
        torch.testing.assert_close(mixed[i].double(), kept * own + (1 - kept) * other, rtol=1e-6, atol=1e-6)
        expected = torch.zeros(4, dtype=torch.float64)
        expected[labels[i]] += how.share
        expected[labels[j]] += 1 - how.share
        torch.testing.assert_close(targets[i].double(), expected, rtol=0, atol=1e-6)


def test_shares_and_boxes_are_published_streams() -> None:
    """Resuming an old run on a newer NumPy must give the same mixtures: these numbers must never change."""
    mixup, cutmix = mixture(3, 7, 32, AugmentConfig(mixup=0.4)), mixture(3, 7, 32, AugmentConfig(cutmix=1.0))
    assert mixup is not None and cutmix is not None
    assert mixup.share == pytest.approx(0.5620339810325741, abs=1e-12) and mixup.box is None
    assert cutmix == Mixture(0.52734375, (5, 0, 27, 22))


def test_shares_follow_beta_and_boxes_their_shares() -> None:
    both = AugmentConfig(mixup=0.4, cutmix=1.0)
    drawn = [mixture(1, step, 64, both) for step in range(4000)]
    blended = np.array([how.share for how in drawn if how is not None and how.box is None])
    cut = [how for how in drawn if how is not None and how.box is not None]
    assert abs(len(cut) / 4000 - 0.5) < 0.03
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert abs(blended.mean() - 0.5) < 0.02 and abs(blended.var() - 1 / (4 * 1.8)) < 0.01
    for how in cut:
        assert how.box is not None
        top, left, bottom, right = how.box
        assert 0 <= top <= bottom <= 64 and 0 <= left <= right <= 64
        assert how.share == 1 - (bottom - top) * (right - left) / 64**2
    assert mixture(1, 5, 64, AugmentConfig()) is None


def _batches(rocks: Path, config: DataConfig, count: int, **place: int) -> list[Batch]:
    manifest = build_manifest(rocks, config, seed=0)
    options = {"rank": 0, "world_size": 1, "start_step": 0} | place
    with contextlib.closing(TrainLoader(manifest, config, 5, device=CPU, **options)) as loader:
        return [next(loader) for _ in range(count)]


CONFIG = DataConfig(resize=20, crop=16, images_per_class=4, threads=1, augment=AugmentConfig(mixup=0.4, cutmix=1.0))


def test_batches_are_mixed_alike_after_a_restart_and_for_any_number_of_ranks(rocks: Path) -> None:
    whole = _batches(rocks, CONFIG, 4)
    plain = _batches(rocks, CONFIG.changed(augment={}), 4)
    for step, (batch, before) in enumerate(zip(whole, plain, strict=True)):
        how = mixture(5, step, 16, CONFIG.augment)
        assert how is not None and before.targets is None
        images, targets = mix(before.images, before.labels, 3, how)
        assert torch.equal(batch.images, images) and torch.equal(batch.labels, before.labels)
        assert batch.targets is not None and torch.equal(batch.targets, targets)
        assert (before.labels[::2] != before.labels[1::2]).all()
    (again,) = _batches(rocks, CONFIG, 1, start_step=3)
    assert torch.equal(again.images, whole[3].images)
    shares = [_batches(rocks, CONFIG, 2, rank=rank, world_size=3) for rank in range(3)]
    for step in range(2):
        assert torch.equal(torch.cat([share[step].images for share in shares]), whole[step].images)
        parts = [part for share in shares for part in share[step].split(2)]
        joined = torch.cat([part.targets for part in parts if part.targets is not None])
        assert torch.equal(joined, whole[step].targets)


def test_pairs_that_ranks_would_part_are_refused(rocks: Path) -> None:
    with pytest.raises(UserError) as caught:
        _batches(rocks, CONFIG, 1, world_size=4)
    assert str(caught.value) == (
        "data.augment.mixup 0.4: images are mixed in pairs, but each of 4 rank(s) has 3; "
        "change data.images_per_class or the number of ranks"
    )
