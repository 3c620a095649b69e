"""Bytes that the ranks of a real training step send, call by call, and beside that on their network interface.

Sent counts what a rank must send at least, with R ranks and the best algorithm known:

    all_reduce of n bytes      2 (R - 1) / R * n        all_gather of n bytes a rank    (R - 1) n
    reduce_scatter of n bytes  (R - 1) / R * n          send of n bytes                 n

gloo's reduce_scatter is an all_reduce of which each rank keeps its part, so it takes twice that.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scaling.memory import Case, contrast_peak, ring_forced
from benchmarks.scaling.processes import loopback_bytes, own_network, raise_loopback, run_module
from fpcn_dist.data.batch import Batch
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.ranks import Ranks, connect
from fpcn_dist.tasks import build_task
from fpcn_dist.training.engine import Engine, build_engine, forward_backward
from fpcn_dist.training.engine.ddp import DDPEngine

GRADIENTS, CONTRAST, CENTER, OTHER = "gradients", "contrast", "centre loss", "other"
CLASSES, CHANNELS, WIDTH = 3, 512, 512
RECIPE = Recipe.model_validate(
    {
        "data": {"resize": 64, "crop": 64},
        "model": {"backbone": "resnet18", "pretrained": False, "hidden": WIDTH},
        "train": {"precision": "fp32"},
    }
)
_WARM_UP, _STEPS = 2, 2
_PURPOSES = {
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks": GRADIENTS,
    "fpcn_kernels.pairs.operator": CONTRAST,
    "fpcn_dist.tasks.losses": CENTER,
}
"""By the innermost module on the stack of a call."""


class Sent(NamedTuple):
    """Of one rank in one step: calls, bytes of their tensors, and bytes to send at least."""

    purpose: str
    kind: str
    calls: float
    payload: float
    sent: float

    @property
    def sent_by_gloo(self) -> float:
        return 2 * self.sent if self.kind == "reduce_scatter" else self.sent


class Exchange(NamedTuple):
    """A step's traffic, with u and v all-gathered or in a ring."""

    ring: bool
    calls: list[Sent]
    interface: float | None
    """Bytes on the loopback interface per rank, headers and acknowledgements included; ``None``: not alone on it."""

    def sent(self, purpose: str | None = None) -> float:
        return sum(call.sent for call in self.calls if purpose in (None, call.purpose))

    def sent_by_gloo(self) -> float:
        return sum(call.sent_by_gloo for call in self.calls)


class Traffic(NamedTuple):
    """What one number of ranks exchanges."""

    ranks: int
    images: int
    """Of the global batch."""
    parameters: int
    exchanges: list[Exchange]
    contrast_peak: int
    """See :func:`benchmarks.scaling.memory.contrast_peak`; of rank 0."""


class Counter:
    """Calls of this process to torch.distributed. DDP reduces from C++, which is not among them but for :func:`watch`.

    Args:
        ranks: R.
    """

    def __init__(self, ranks: int) -> None:
        self._factors = {
            "all_reduce": 2 * (ranks - 1) / ranks,
            "all_gather": ranks - 1.0,
            "reduce_scatter": (ranks - 1) / ranks,
            "send": 1.0,
        }
        self._counts: dict[tuple[str, str], list[float]] = {}

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        payloads: dict[str, tuple[str, Callable[..., Iterable[Tensor]]]] = {
            "all_reduce": ("all_reduce", lambda tensor, *_, **__: [tensor]),
            "all_gather": ("all_gather", lambda _, tensor, *__, **___: [tensor]),
            "reduce_scatter": ("reduce_scatter", lambda _, tensors, *__, **___: tensors),
            "batch_isend_irecv": ("send", lambda moves: [move.tensor for move in moves if move.op is dist.isend]),
        }
        originals = {name: getattr(dist, name) for name in payloads}

        def counted(name: str) -> Callable[..., Any]:
            kind, payload = payloads[name]

            def call(*args: Any, **kwargs: Any) -> Any:
                self._add(kind, list(payload(*args, **kwargs)))
                return originals[name](*args, **kwargs)

            return call

        for name in payloads:
            setattr(dist, name, counted(name))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _add(self, kind: str, tensors: list[Tensor]) -> None:
        # The contrast's integers are the sizes of the ranks' batches.
        purpose = _purpose() if all(tensor.is_floating_point() for tensor in tensors) else OTHER
        payload = sum(tensor.nbytes for tensor in tensors)
        count = self._counts.setdefault((purpose, kind), [0.0, 0.0, 0.0])
        for index, value in enumerate((1, payload, self._factors[kind] * payload)):
            count[index] += value

    def per_step(self, steps: int) -> list[Sent]:
        return [Sent(*names, *(value / steps for value in count)) for names, count in self._counts.items()]


def _purpose() -> str:
    frame = sys._getframe()
    while frame is not None:
        purpose = _PURPOSES.get(frame.f_globals["__name__"])
        if purpose is not None:
            return purpose
        frame = frame.f_back
    return OTHER


def watch(engine: Engine) -> None:
    """Let DDP reduce its buckets by torch.distributed's all_reduce in Python: the same sums, by the standard hook."""
    if isinstance(engine, DDPEngine) and isinstance(engine.module, DistributedDataParallel):
        engine.module.register_comm_hook(engine.group, allreduce_hook)


def measure_traffic(ranks: int, images: int = 42) -> Traffic:
    """Start ``ranks`` gloo ranks on this machine, each with ``images`` fixed random images, and watch a few steps.

    Engine, task and model are those of training (:data:`RECIPE`); where that is allowed the ranks have a network
    of their own.
    """
    prefix = own_network()
    request = {"ranks": ranks, "images": images, "own_network": prefix is not None}
    found = run_module(__name__, request, prefix=prefix or ())
    exchanges = [
        Exchange(ring, [Sent(*call) for call in calls], interface) for ring, calls, interface in found["exchanges"]
    ]
    return Traffic(ranks, ranks * images, found["parameters"], exchanges, found["contrast_peak"])


def _rank_main(rank: int, request: dict[str, Any], folder: str) -> None:
    size = request["ranks"]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    with connect(FileStore(f"{folder}/store", size)) as ranks:
        found = _measure(ranks, request["images"], request["own_network"])
    if ranks.first:
        Path(folder, "found.json").write_text(json.dumps(found))


def _measure(ranks: Ranks, images: int, own_network: bool) -> dict[str, Any]:
    engine = build_engine(RECIPE, build_task(RECIPE, CLASSES, ranks.group), ranks)
    watch(engine)
    batch = _batch(images, ranks.rank)
    for step in range(_WARM_UP):
        _train(engine, batch, step)
    exchanges = []
    for ring in (False, True) if ranks.group is not None else (False,):
        counter = Counter(ranks.world_size)
        with ring_forced(ring), counter.counting():
            before = _interface_bytes()
            for step in range(_STEPS):
                _train(engine, batch, step)
            interface = (_interface_bytes() - before) / _STEPS / ranks.world_size if own_network else None
        exchanges.append((ring, counter.per_step(_STEPS), interface))
    peak = contrast_peak(Case(ranks.world_size, images, CLASSES, channels=CHANNELS, width=WIDTH), ranks.group)
    parameters = sum(p.numel() for p in engine.task.parameters() if p.requires_grad)
    return {"exchanges": exchanges, "parameters": parameters, "contrast_peak": peak}


def _train(engine: Engine, batch: Batch, step: int) -> None:
    forward_backward(engine, batch, step, 1)
    engine.update(lr=1e-3)


def _batch(images: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    side = RECIPE.data.crop
    pixels = torch.randn(images, 3, side, side, generator=generator)
    ids = torch.arange(images)
    return Batch(pixels, ids % CLASSES, ids, ids, torch.zeros(images, 3, dtype=torch.int64))


def _interface_bytes() -> int:
    """Read by every rank while none is sending."""
    dist.barrier()
    count = loopback_bytes()
    dist.barrier()
    return count


def _main() -> None:
    request = json.loads(sys.argv[1])
    if request["own_network"]:
        raise_loopback()
    with tempfile.TemporaryDirectory(prefix="fpcn-scaling-") as folder:
        # Forked, so that what all ranks import is imported once; nothing has been computed yet.
        start_processes(_rank_main, (request, folder), nprocs=request["ranks"], start_method="fork")
        print(Path(folder, "found.json").read_text())


if __name__ == "__main__":
    _main()
