"""A model of masked_pool's forward pass: what an early or a late mask costs, without a GPU. None of it is measured.

    python -m benchmarks masked_pool --model

A discrete simulation. Programs start in order, as many at once as the multiprocessors hold. Each waits for its tile
from memory, issues the instructions of its sum, and counts at its image; the last one of an image finds the mask, in a
given time. Then it pools a tile of the image ``lag`` images before, from the L2, or from memory if more than the L2
holds has been read since. What comes too early for its mask is left

    serial    to the program that finds the mask, which pools one tile after the other (the kernels before the queue);
    queue     to the second launch, which pools it beside the last images.

Memory, the L2 and the issue slots of a multiprocessor serve who asks first. Rates and latencies are round figures of an
H200. Processes are generators, which give the time until which they wait.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

from fpcn_kernels.pooling.plan import L2_SHARE

from benchmarks._harness import show

MICROSECOND = 1e-6
# What the kernels were before the queue: programs of a multiprocessor, images of lag.
BEFORE = {"resident": 5, "lag": 26}


class Gpu(NamedTuple):
    """Bytes, seconds, and what passes in a second."""

    multiprocessors: int = 132
    bandwidth: float = 4.3e12
    """Of a copy, as measured."""
    l2_bandwidth: float = 7e12
    l2_bytes: float = 50 * 2**20 * L2_SHARE
    issue_rate: float = 4 * 1.755e9
    """Of a multiprocessor."""
    memory_latency: float = 0.9 * MICROSECOND
    l2_latency: float = 0.4 * MICROSECOND
    atomic_latency: float = 0.7 * MICROSECOND
    launch: float = 2 * MICROSECOND


class Work(NamedTuple):
    images: int
    splits: int
    """Programs of an image."""
    tile_bytes: float
    sum_instructions: float
    """Of all warps of a program."""
    pool_instructions: float
    mask_seconds: float
    resident: int
    """Programs that a multiprocessor runs at once."""
    lag: int


class Server:
    """Serves one request after the other."""

    def __init__(self, rate: float) -> None:
        self.rate, self.free = rate, 0.0

    def done(self, now: float, amount: float) -> float:
        """When a request made now is served."""
        self.free = max(now, self.free) + amount / self.rate
        return self.free


# Returns the time at its end.
Steps = Generator[float, None, float]


class Simulation:
    """One forward pass; ``serial`` or with the queue."""

    def __init__(self, gpu: Gpu, work: Work, serial: bool = False) -> None:
        self.gpu, self.work, self.serial = gpu, work, serial
        self.memory, self.l2 = Server(gpu.bandwidth), Server(gpu.l2_bandwidth)
        self.arrived: Counter[int] = Counter()
        self.ready: set[int] = set()
        self.early: Counter[int] = Counter()
        """Tiles of each image that came before its mask."""
        self.read = 0.0
        """Bytes from memory so far."""
        self.read_until: dict[int, float] = {}
        """Those when the last tile of an image came."""

    def seconds(self) -> float:
        """From the first launch to the end of the second."""
        images, splits = self.work.images, self.work.splits
        end = self._launch((b for b in range(images) for _ in range(splits)), self._sum_and_pool, 0)
        last = [b for b in range(max(0, images - self.work.lag), images) for _ in range(splits)]
        return self._launch(iter([*last, *([] if self.serial else self.early.elements())]), self._pool, end)

    def _launch(self, tiles: Iterator[int], program: Callable[[int, Server, float], Steps], end: float) -> float:
        """When a launch that follows ``end`` ends, with a program for each tile, named by its image."""
        start = end + self.gpu.launch
        issue = [Server(self.gpu.issue_rate) for _ in range(self.gpu.multiprocessors)]
        slots = [self._slot(tiles, program, server, start) for _ in range(self.work.resident) for server in issue]
        waiting = [(start, order, slot) for order, slot in enumerate(slots)]
        while waiting:
            end, order, slot = heapq.heappop(waiting)
            if (until := next(slot, None)) is not None:
                heapq.heappush(waiting, (until, order, slot))
        return end

    def _slot(self, tiles: Iterator[int], program: Callable[[int, Server, float], Steps], issue: Server, now: float):
        """Runs one program after the other."""
        for image in tiles:
            now = yield from program(image, issue, now)

    def _sum_and_pool(self, image: int, issue: Server, now: float) -> Steps:
        gpu, work = self.gpu, self.work
        yield (now := self.memory.done(now, work.tile_bytes) + gpu.memory_latency)
        self.read += work.tile_bytes
        self.read_until[image] = self.read
        yield (now := issue.done(now, work.sum_instructions))
        yield (now := now + gpu.atomic_latency)
        self.arrived[image] += 1
        if self.arrived[image] == work.splits:
            yield (now := now + work.mask_seconds)
            self.ready.add(image)
            for _ in range(self.early[image] if self.serial else 0):
                now = yield from self._pool(image, issue, now)
        image -= work.lag
        if image >= 0:
            yield (now := now + gpu.atomic_latency)
            if image in self.ready:
                now = yield from self._pool(image, issue, now)
            else:
                self.early[image] += 1
        return now

    def _pool(self, image: int, issue: Server, now: float) -> Steps:
        gpu, size = self.gpu, self.work.tile_bytes
        if self.read - self.read_until[image] <= gpu.l2_bytes:
            now = self.l2.done(now, size) + gpu.l2_latency
        else:
            now = self.memory.done(now, size) + gpu.memory_latency
        yield now
        yield (now := issue.done(now, self.work.pool_instructions))
        return now


def show_model(work: Work, masks_us: Sequence[float] = (0, 2, 4, 5, 6, 7, 8, 12, 20)) -> list[dict[str, float]]:
    """Prints what a forward pass takes by the time that a mask takes; gives the figures."""
    figures = [_figures(work._replace(mask_seconds=mask_us * MICROSECOND)) for mask_us in masks_us]
    show(
        f"Modelled, not measured: forward pass of {work.images} images, {work.splits} programs each, on an H200",
        ["a mask takes us", "serial us", "queue us", "left to the queue", "all read twice us"],
        [
            [
                f"{mask_us:g}",
                f"{f['serial_us']:.0f}",
                f"{f['queue_us']:.0f}",
                f"{f['left']:.0%}",
                f"{f['twice_us']:.0f}",
            ]
            for mask_us, f in zip(masks_us, figures, strict=True)
        ],
        left=0,
        caption=f"serial: as before the queue, lag {BEFORE['lag']}, {BEFORE['resident']} programs a multiprocessor; "
        f"queue: lag {work.lag}, {work.resident} programs a multiprocessor",
    )
    return figures


def _figures(work: Work) -> dict[str, float]:
    serial = Simulation(Gpu(), work._replace(**BEFORE), serial=True)
    queue = Simulation(Gpu(), work)
    twice = Simulation(Gpu(), work._replace(lag=work.images))
    return {
        "mask_us": work.mask_seconds / MICROSECOND,
        "serial_us": serial.seconds() / MICROSECOND,
        "queue_us": queue.seconds() / MICROSECOND,
        "left": queue.early.total() / (work.images * work.splits),
        "twice_us": twice.seconds() / MICROSECOND,
    }
