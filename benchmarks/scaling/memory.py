"""Memory of the contrast on one rank, counted where PyTorch's CPU allocator gives and takes it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fpcn_kernels import PairHead, pair_contrast
from torch.profiler import ProfilerActivity, profile

from benchmarks.scaling.processes import run_module
from fpcn_dist.runtime.collectives import Group


class Case(NamedTuple):
    """A rank's share of a global batch of ``ranks * images`` images."""

    ranks: int
    images: int
    classes: int
    ring: bool = False
    channels: int = 2048
    width: int = 512


def contrast_peak(case: Case, group: Group | None) -> int:
    """Bytes of all tensors that exist at the same time, at most, above the operands: forward and backward, float32.

    Exact and the same every time, as it adds up each allocation of a tensor; scratch memory that matrix libraries get
    elsewhere is not in it.
    """
    torch.manual_seed(0)
    images, classes, channels, width = case.images, case.classes, case.channels, case.width
    shapes = [(images, channels), (width, 2 * channels), (width,), (channels, width), (channels,), (classes, channels)]
    operands = [torch.randn(shape).mul_(0.02).requires_grad_() for shape in [*shapes, (classes,)]]
    labels = torch.arange(images) % classes
    pooled, *weights = operands
    with ring_forced(case.ring), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        pair_contrast(pooled, labels, PairHead(*weights), group=group).backward()
    kineto = profiler.profiler
    assert kineto is not None and kineto.kineto_results is not None
    changes: list[Any] = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def lone_rank_peaks(cases: Sequence[Case]) -> list[int]:
    """:func:`contrast_peak` of rank 0 alone, among ranks that do not exist.

    PyTorch's fake process group stands for them: what would arrive has the right size and a wrong content, on which
    memory does not depend. In a process of its own.
    """
    return run_module(__name__, cases)


@contextlib.contextmanager
def ring_forced(forced: bool = True) -> Iterator[None]:
    """Within, u and v pass from rank to rank however few they are."""
    module: Any = sys.modules["fpcn_kernels.pairs.operator"]
    before = module._GATHERED_BYTES
    if forced:
        module._GATHERED_BYTES = -1
    try:
        yield
    finally:
        module._GATHERED_BYTES = before


def _main() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    peaks = []
    for case in (Case(*values) for values in json.loads(sys.argv[1])):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.ranks)
        peaks.append(contrast_peak(case, dist.group.WORLD))
        dist.destroy_process_group()
    print(json.dumps(peaks))


if __name__ == "__main__":
    _main()
