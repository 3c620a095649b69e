"""PCA-Net's training on real ranks, whose images take partners from one another, beside one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fpcn_dist.data.batch import Batch
from fpcn_dist.tasks import build_task
from tests.helpers.compared import CLASSES, recipe
from tests.helpers.forked import start_ranks

IMAGES, SIDE = 6, 32
WATCHED = ("model.classifier.weight", "model.backbone.net.layer4.1.conv2.weight", "model.backbone.net.conv1.weight")


def run(rows: slice, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Loss, parts, centres and some gradients of the images ``rows`` of the global batch."""
    torch.manual_seed(0)
    index = torch.arange(IMAGES)
    columns = torch.randn(IMAGES, 3, SIDE, SIDE), index % 2, index, torch.zeros_like(index), torch.zeros(IMAGES, 3)
    chosen = recipe("pca_net", model={"norm": "group"}, contrast={"num_pairs": 2 * IMAGES})
    task = build_task(chosen, CLASSES, group)
    output = task(Batch(*(column[rows] for column in columns)), 4)
    output.loss.backward()
    gradients = {name: p.grad for name, p in task.named_parameters() if name in WATCHED}
    return {"loss": output.loss.detach(), **output.parts, **gradients, "centers": task.centers.centers}


def rank_main(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    share = IMAGES // world_size
    torch.save(run(slice(rank * share, (rank + 1) * share), dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2])
def test_means_over_ranks_are_those_of_one_process(world_size, tmp_path: Path):
    start_ranks(rank_main, world_size, str(tmp_path), ranks=world_size)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    alone = run(slice(None), None)
    assert alone["center_loss"] > 0 and set(WATCHED) <= alone.keys()
    for name, expected in alone.items():
        mean = torch.stack([rank[name] for rank in ranks]).mean(0)
        torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()), msg=name)
    assert torch.equal(ranks[0]["centers"], ranks[1]["centers"])
    assert not torch.equal(ranks[0]["class_loss"], ranks[1]["class_loss"])
