"""pair_contrast over real gloo ranks: what DDP averages equals the single-process values of the global batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fpcn_kernels import PairHead, pair_contrast

pytestmark = pytest.mark.slow

SIZES = {1: (11,), 2: (4, 7), 3: (5, 1, 5), 4: (3, 4, 0, 4)}
IMAGES, CHANNELS, WIDTH, CLASSES = 11, 6, 5, 3
LISTED = torch.randint(IMAGES, (14, 2), generator=torch.Generator().manual_seed(1))
OPTIONS = {
    "all": {},
    "all, dropout": {"dropout": 0.3, "seed": 5},
    "identity": {"activation": "identity"},
    "ring": {"ring": True},
    "ring, random, dropout": {"ring": True, "pairs": 100, "seed": 3, "dropout": 0.3},
    "ring, listed": {"ring": True, "pairs": LISTED},
    "random": {"pairs": 9, "seed": -2},
    "random, many": {"pairs": 100, "seed": 3, "dropout": 0.3},
    "listed": {"pairs": LISTED},
    "shifts, dropout": {"shifts": 4, "seed": 3, "dropout": 0.3},
    "ring, shifts": {"ring": True, "shifts": 4},
    "listed, dropout": {"pairs": LISTED, "dropout": 0.5, "seed": 8},
}


def _problem():
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (IMAGES, CHANNELS),
        (WIDTH, 2 * CHANNELS),
        (WIDTH,),
        (CHANNELS, WIDTH),
        (CHANNELS,),
        (CLASSES, CHANNELS),
        (CLASSES,),
    )
    operands = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return operands, torch.randint(CLASSES, (IMAGES,), generator=generator)


def _run(rank, options, group=None, rows=slice(None), compiled=False):
    """Loss and gradients of the rank that owns ``rows``."""
    options = dict(options)
    gathered_bytes = 0 if options.pop("ring", False) else 2**28
    (pooled, *parameters), labels = _problem()
    pooled = pooled.detach()[rows].requires_grad_()

    def loss_of(pooled, labels, *parameters):
        return pair_contrast(pooled, labels, PairHead(*parameters), group=group, **options)

    sys.modules["fpcn_kernels.pairs.operator"]._GATHERED_BYTES = gathered_bytes
    function = torch.compile(loss_of, fullgraph=True, backend="aot_eager") if compiled else loss_of
    loss = function(pooled, labels[rows], *parameters)
    return loss.detach(), *torch.autograd.grad(loss, [pooled, *parameters])


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    for world_size, sizes in SIZES.items():
        group = dist.new_group(list(range(world_size)))
        if rank >= world_size:
            continue
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for name, options in OPTIONS.items():
            torch.save(_run(rank, options, group, rows), f"{folder}/{world_size} {name} {rank}")
        sys.modules["fpcn_kernels.pairs.operator"]._GATHERED_BYTES = 0
        with torch.no_grad():
            pooled, *parameters = _problem()[0]
            loss = pair_contrast(pooled[rows], _problem()[1][rows], PairHead(*parameters), group=group)
        torch.save(loss, f"{folder}/{world_size} loss only {rank}")
        if world_size == 1:
            torch.save(_run(rank, OPTIONS["all, dropout"], group, compiled=True), f"{folder}/1 compiled {rank}")
    (pooled, *parameters), labels = _problem()
    arguments = pooled[rows], labels[rows], PairHead(*parameters)
    with torch.no_grad():
        pooled[-1, 0] = torch.nan
        loss = pair_contrast(*arguments, group=dist.group.WORLD)
    torch.save(loss, f"{folder}/4 non-finite {rank}")
    try:
        pair_contrast(*arguments, pairs=122, group=dist.group.WORLD)
    except ValueError as error:
        Path(f"{folder}/4 error {rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=4)
    return folder


def _check(results, world_size, name, options):
    ranks = [torch.load(results / f"{world_size} {name} {rank}") for rank in range(world_size)]
    loss, pooled, *parameters = _run(0, options)
    got_loss, got_pooled, *got_parameters = (list(values) for values in zip(*ranks, strict=True))
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(torch.stack(got_loss).mean(), loss, **close)
    torch.testing.assert_close(torch.cat(got_pooled) / world_size, pooled, **close)
    for got, expected in zip(got_parameters, parameters, strict=True):
        torch.testing.assert_close(torch.stack(got).mean(0), expected, **close)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("world_size", SIZES)
def test_mean_over_ranks_is_the_single_process_value(results, world_size, name):
    _check(results, world_size, name, OPTIONS[name])


@pytest.mark.parametrize("world_size", SIZES)
def test_ring_without_gradients_is_the_same_loss(results, world_size):
    losses = [torch.load(results / f"{world_size} loss only {rank}") for rank in range(world_size)]
    torch.testing.assert_close(torch.stack(losses).mean(), _run(0, {})[0], rtol=1e-11, atol=1e-12)


def test_compiled_without_a_graph_break(results):
    _check(results, 1, "compiled", OPTIONS["all, dropout"])


def test_non_finite_image_of_one_rank_makes_the_mean_nan(results):
    assert torch.stack([torch.load(results / f"4 non-finite {rank}") for rank in range(4)]).mean().isnan()


def test_error_names_the_global_batch(results):
    for rank in range(4):
        assert "pairs 122 exceeds the 11^2 = 121 ordered pairs" in (results / f"4 error {rank}").read_text()
