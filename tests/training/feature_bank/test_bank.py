"""The feature bank itself: what its rows are, who writes them, and what happens where writing stops half way."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest
import torch

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import EvalLoader, TrainLoader
from fpcn_dist.models import FPCN
from fpcn_dist.models.classifier import object_share
from fpcn_dist.models.fpcn import region_name
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.ranks import connect
from fpcn_dist.tasks import Task, build_task
from fpcn_dist.training.feature_bank import attach
from fpcn_dist.training.feature_bank.attach import build_banks, write_share
from fpcn_dist.training.loop import train
from tests.helpers.distilling import ALONE, CPU, recipe
from tests.helpers.forked import start_ranks
from tests.helpers.launching import free_port, losses
from tests.training.feature_bank.test_training import frozen

REGIONS = {
    "none": {"region": "none"},
    "threshold": {"theta": 0.25},
    "largest": {"region": "largest", "area_scale": False},
}


@pytest.fixture(scope="module")
def chosen() -> Recipe:
    """Maps of 3 x 3 cells."""
    return recipe("contrast", model={"norm": "batch"}, data={"resize": 104, "crop": 96})


@pytest.fixture(scope="module")
def manifest(rocks, chosen) -> Manifest:
    return build_manifest(rocks, chosen.data, chosen.seed)


@pytest.fixture(scope="module")
def task(chosen) -> Task:
    return build_task(chosen, 3).eval()


def test_all_regions_come_from_one_pass_and_are_those_of_their_networks(chosen, manifest, task, tmp_path, monkeypatch):
    regions = [chosen.model.changed(**region) for region in REGIONS.values()]
    passes, forward = [], task.model.backbone.forward
    monkeypatch.setattr(task.model.backbone, "forward", lambda images: passes.append(1) or forward(images))
    banks = build_banks(tmp_path, chosen, task, manifest, chunk=12, regions=regions)
    for bank in banks:
        bank.prepare()
        write_share(bank, chosen, task, regions, 0, 1, CPU)
    assert len(passes) == 7 + 1
    batch = next(iter(TrainLoader(manifest, chosen.data, chosen.seed, rank=0, world_size=1, device=CPU)))
    (shown,) = EvalLoader.from_manifest(manifest, "val", chosen.data, rank=0, world_size=1, device=CPU)
    found = set()
    for region in regions:
        own = FPCN(num_classes=3, **region.model_dump()).eval()
        own.load_state_dict(task.model.state_dict())
        pool = own.pool(batch.images)
        pooled, share = banks[0].open(region_name(region), CPU).with_share(batch.image_ids, batch.view_ids)
        assert torch.equal(pooled, pool.pooled) and torch.equal(share, object_share(pool.mask))
        validation = banks[1].open(region_name(region), CPU)(shown.image_ids, shown.view_ids)
        assert torch.equal(validation, own.pool(shown.images).pooled)
        found.add(pooled.sum().item())
    assert len(found) == 3


def test_a_bank_of_several_regions_serves_each_and_refuses_another(chosen, manifest, task, tmp_path):
    regions = [chosen.model.changed(**region) for region in REGIONS.values()]
    for bank in build_banks(tmp_path, chosen, task, manifest, chunk=12, regions=regions):
        bank.prepare()
    for region in regions:
        for bank in build_banks(tmp_path, chosen, task, manifest, chunk=5, regions=[region]):
            bank.prepare()
            assert bank.chunk == (12 if bank.split == "train" else 15) and bank.width == 3 * (bank.channels + 1)
    other = chosen.model.changed(theta=0.5)
    with pytest.raises(UserError, match=r"\(region 'none' and 'threshold, theta 0.25' and .* instead of 'threshold, t"):
        build_banks(tmp_path, chosen, task, manifest, chunk=12, regions=[other])[0].prepare()


def test_the_features_of_other_images_are_refused(chosen, manifest, task, tmp_path):
    build_banks(tmp_path, chosen, task, manifest, chunk=12)[0].prepare()
    fewer = dataclasses.replace(manifest, images=manifest.images[1:])
    with pytest.raises(UserError, match=rf"\(manifest {manifest.hash[:16]} instead of {fewer.hash[:16]}\)"):
        build_banks(tmp_path, chosen, task, fewer, chunk=12)[0].prepare()


def test_a_run_that_dies_inside_the_bank_goes_on_with_what_was_written(rocks, tmp_path, monkeypatch):
    chosen, compute, computed = frozen(), attach.Encoder.__call__, []

    def count(encoder, images):
        computed.append(len(images))
        if len(computed) == 4:
            raise KeyboardInterrupt
        return compute(encoder, images)

    monkeypatch.setattr(attach.Encoder, "__call__", count)
    with pytest.raises(KeyboardInterrupt):
        train(chosen, rocks, tmp_path / "run", ALONE)
    assert list((tmp_path / "run/features/train/written").read_bytes()) == [1, 1, 1, 0, 0, 0, 0]
    train(chosen, rocks, tmp_path / "run", ALONE)
    assert computed[4:] == 4 * [12] + [15]
    train(chosen, rocks, tmp_path / "whole", ALONE)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_disk_that_is_too_full_stops_no_run_that_did_not_ask_for_a_bank(rocks, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    train(frozen(), rocks, tmp_path / "run", ALONE)
    assert (
        "No space left on device" in (out := capsys.readouterr().out) and "features are computed in every step" in out
    )
    with pytest.raises(UserError, match="No space left on device"):
        train(frozen(train={"feature_bank": str(tmp_path / "bank")}), rocks, tmp_path / "asked", ALONE)


def rank_main(rank: int, port: int, folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    computed, compute = [], attach.Encoder.__call__
    attach.Encoder.__call__ = lambda encoder, images: computed.append(len(images)) or compute(encoder, images)
    with connect() as ranks:
        train(frozen(epochs=3), data, folder / "stored", ranks)
        (folder / f"{rank}").write_text(str(computed))
        train(frozen(epochs=3, train={"feature_bank": False}), data, folder / "computed", ranks)
        train(frozen(data={"classes_per_batch": None, "images_per_class": None}), data, folder / "all", ranks)


@pytest.mark.slow
def test_two_ranks_share_the_writing_and_train_as_one(rocks, tmp_path):
    start_ranks(rank_main, free_port(), tmp_path, rocks, ranks=2)
    # 84 views in chunks of a rank's 6, and one chunk of 15 validation images.
    assert (tmp_path / "0").read_text() == str(7 * [6] + [15]) and (tmp_path / "1").read_text() == str(7 * [6])
    assert losses(tmp_path / "stored") == losses(tmp_path / "computed")
    train(frozen(epochs=3), rocks, tmp_path / "alone", ALONE)
    # From the thaw on, BatchNorm sees the images of a rank alone.
    assert losses(tmp_path / "stored")[:9] == pytest.approx(losses(tmp_path / "alone")[:9], rel=1e-4)
    train(frozen(data={"classes_per_batch": None, "images_per_class": None}), rocks, tmp_path / "all alone", ALONE)
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "all alone"), rel=1e-4)
