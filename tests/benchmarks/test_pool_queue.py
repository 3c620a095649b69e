"""The model of masked_pool's queue pools every tile once, and shows what the queue is for."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton")

from benchmarks._pool_queue import BEFORE, MICROSECOND, Gpu, Simulation, Work

# As compiled for 256 images of 2048 x 14 x 14 in bfloat16.
WORK = Work(
    images=256,
    splits=32,
    tile_bytes=64 * 196 * 2,
    sum_instructions=2600,
    pool_instructions=2600,
    mask_seconds=4 * MICROSECOND,
    resident=6,
    lag=31,
)
BYTES = WORK.images * WORK.splits * WORK.tile_bytes


class Counting(Simulation):
    """Counts how often tiles of an image are pooled."""

    def seconds(self) -> float:
        self.pooled: Counter[int] = Counter()
        return super().seconds()

    def _pool(self, image, issue, now):
        self.pooled[image] += 1
        return (yield from super()._pool(image, issue, now))


@pytest.mark.parametrize("serial", [True, False])
@pytest.mark.parametrize("mask_us", [0, 5, 50])
@pytest.mark.parametrize("lag", [1, 7, 40])
def test_every_tile_is_pooled_once(lag, mask_us, serial):
    work = WORK._replace(images=40, splits=8, lag=lag, mask_seconds=mask_us * MICROSECOND)
    simulation = Counting(Gpu(multiprocessors=10), work, serial)
    simulation.seconds()
    assert simulation.pooled == {image: 8 for image in range(40)}


def test_reading_twice_takes_two_reads():
    gpu = Gpu()
    once = Simulation(gpu, WORK).seconds()
    twice = Simulation(gpu, WORK._replace(lag=WORK.images)).seconds()
    assert BYTES / gpu.bandwidth < once < 2 * BYTES / gpu.bandwidth < twice


def test_a_slower_mask_was_a_cliff_and_is_none():
    def seconds(mask_us: float, serial: bool) -> float:
        work = WORK._replace(mask_seconds=mask_us * MICROSECOND, **(BEFORE if serial else {}))
        return Simulation(Gpu(), work, serial).seconds()

    assert seconds(6, serial=True) > 1.2 * seconds(4, serial=True)
    assert seconds(6, serial=False) < 1.1 * seconds(4, serial=False)
    # A region that takes long to find: no program pools alone.
    assert seconds(12, serial=False) < 0.95 * seconds(12, serial=True)
