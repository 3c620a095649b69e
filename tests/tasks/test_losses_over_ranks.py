"""Losses of a batch that real ranks share, beside those of one process that holds all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fpcn_kernels import PairHead
from torch import Tensor, nn

from fpcn_dist.runtime.collectives import Group, all_gather, all_gather_unlike, all_reduce_sum, world_size
from fpcn_dist.tasks.losses import ClassCenters, center_loss, gated_contrast_loss, hardest_pairs
from tests.helpers.forked import start_ranks

pytestmark = pytest.mark.slow

IMAGES, PIXELS, CHANNELS, HIDDEN, CLASSES = 7, 10, 6, 5, 3
LABELS = torch.tensor([0, 1, 1, 0, 0, 1, 0])
SPLITS = [(4, 3), (2, 0, 5)]


def run(rows: slice, group: Group | None) -> dict[str, Any]:
    """All losses and gradients that the images ``rows`` of the global batch see."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    images, labels = torch.randn(IMAGES, PIXELS)[rows], LABELS[rows]
    encoder, layers = nn.Linear(PIXELS, CHANNELS), []
    for shape in ((2 * CHANNELS, HIDDEN), (HIDDEN, CHANNELS), (CHANNELS, CLASSES)):
        layers += list(nn.Linear(*shape).parameters())
    parameters = {"encoder": encoder.weight, **{f"layer{i}": layer for i, layer in enumerate(layers)}}

    centers = ClassCenters(CLASSES, CHANNELS)
    centers.update(encoder(images), labels, group=group)
    centers.update(encoder(images).square(), labels, rate=0.3, group=group)

    def partners_loss(pooled: Tensor) -> Tensor:
        """A loss of each image of this rank with the next one of the global batch, which another rank may hold."""
        everyone = all_gather_unlike(pooled, group)
        start = rows.start or 0
        partner = (torch.arange(len(pooled)) + start + 1) % IMAGES
        products = (pooled * everyone[partner]).sum(1).tanh()
        return products.sum() * world_size(group) / IMAGES

    def losses(pooled: Tensor) -> dict[str, Tensor]:
        head, options = PairHead(*layers), {"dropout": 0.3, "seed": 5, "group": group}
        pairs = hardest_pairs(all_gather(pooled, group), all_gather(labels, group), 4 * IMAGES)
        return {
            "center_mean": center_loss(pooled, labels, centers.centers, group=group),
            "center_sum": center_loss(pooled, labels, centers.centers, reduction="sum", group=group),
            "partners": partners_loss(pooled),
            "gated": gated_contrast_loss(pooled, labels, head, pairs=pairs, **options),
        }

    result: dict[str, Any] = {"rows": all_gather(images, group), "total": all_reduce_sum(images.sum(0), group)}
    result["centers"], result["seen"] = centers.centers, centers.seen
    pooled = encoder(images)
    for name, loss in losses(pooled).items():
        gradients = torch.autograd.grad(loss, [pooled, *parameters.values()], retain_graph=True, allow_unused=True)
        gradients = dict(zip(["pooled", *parameters], gradients, strict=True))
        result[name] = {"loss": loss.detach(), **{key: g for key, g in gradients.items() if g is not None}}
    return result


def rank_main(rank: int, split: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(split))
    start = sum(split[:rank])
    torch.save(run(slice(start, start + split[rank]), dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    try:
        return run(slice(None), None)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module", params=SPLITS, ids=str)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    start_ranks(rank_main, request.param, str(folder), ranks=len(request.param))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(request.param))]


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_centers_are_the_same_bits_on_all_ranks_and_those_of_one_process(ranks, alone) -> None:
    for rank in ranks:
        assert torch.equal(rank["centers"], ranks[0]["centers"])
        assert_exact(rank["centers"], alone["centers"])
        assert rank["seen"].tolist() == [True, True, False]


def test_rows_are_gathered_in_rank_order_and_summed(ranks, alone) -> None:
    for rank in ranks:
        assert torch.equal(rank["rows"], alone["rows"])
        assert torch.equal(rank["total"], ranks[0]["total"])
        assert_exact(rank["total"], alone["total"])


@pytest.mark.parametrize("name", ["center_mean", "center_sum", "partners", "gated"])
def test_means_over_ranks_are_the_values_of_one_process(name: str, ranks, alone) -> None:
    expected = dict(alone[name])
    pooled = expected.pop("pooled")
    assert {"loss", "encoder"} <= expected.keys()
    for key, value in expected.items():
        assert value.abs().max() > 0
        assert_exact(torch.stack([rank[name][key] for rank in ranks]).mean(0), value)
    assert_exact(torch.cat([rank[name]["pooled"] for rank in ranks]), len(ranks) * pooled)
