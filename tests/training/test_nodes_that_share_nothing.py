"""Two nodes with a folder, a recipe or images each for itself: refused on all ranks, before anything is trained."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.runs import folder as runs
from fpcn_dist.runs.folder import RunFolder, open_together
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.ranks import connect
from fpcn_dist.training.start import settle_start
from tests.helpers.distilling import recipe
from tests.helpers.forked import start_ranks
from tests.helpers.launching import free_port

IMAGES = Manifest("nowhere", ("a", "b"), (), ())


def start_on_a_rank(rank: int, port: int, disks: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runs._SIGHT = 0.2
    with connect() as ranks:
        for name in ("empty", "earlier"):
            output = disks / f"node {rank}" / name
            message = r"rank 1 on \S+ does not see what the first rank writes there: the folder is not shared; choose"
            with pytest.raises(UserError, match=message):
                open_together(RunFolder(output), ranks)
        assert not [path for path in disks.rglob(".seen*")]
        open_together(RunFolder(disks / "shared"), ranks)

        same, mine = recipe("classify"), recipe("classify", optim={"lr": 0.1 * (rank + 1)})
        with pytest.raises(UserError, match=r"rank 1 on \S+ was started with another recipe.*optim\.lr 0\.1 -> 0\.2"):
            settle_start(RunFolder(disks / "shared"), mine, IMAGES, ranks)
        others = dataclasses.replace(IMAGES, classes=("a", "b" * (rank + 1)))
        with pytest.raises(UserError, match=r"rank 1 on \S+ has other images, or another split of them"):
            settle_start(RunFolder(disks / "shared"), same, others, ranks)
        cadence = recipe("classify", train={"log_every": rank + 1}, data={"threads": rank + 1})
        assert settle_start(RunFolder(disks / "shared"), cadence, IMAGES, ranks).state is None


def test_what_ranks_do_not_share_is_named_on_all_of_them(tmp_path):
    """The second node's disk holds nothing, or what an earlier run left there."""
    (tmp_path / "node 1/earlier").mkdir(parents=True)
    (tmp_path / "node 1/earlier/recipe.yaml").write_text("name: earlier\n")
    start_ranks(start_on_a_rank, free_port(), tmp_path, ranks=2)
