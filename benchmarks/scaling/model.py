"""Time of a training step on many GPUs, computed from what one costs; docs/scaling.md derives it and names each source.

    GPU  = compute + pairs + exchange + centre loss + what is left of the gradients' sum after the backward pass
    step = max(GPU, host, feed)

No GPU has confirmed it: it says which term grows, and roughly when. Legend: R GPUs, B images of each, N = R B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from fpcn_dist.runtime.errors import UserError

FLOAT, DOUBLE = 4, 8


@dataclass(frozen=True)
class Inputs:
    """What :func:`predict` computes from; ResNet-101 at 448 px on nodes of H100 SXM if nothing else is said."""

    images_per_gpu: int = 42
    """B: the paper's whole batch."""
    parameters: int = 45_654_595
    """Counted (fpcn_resnet101, 3 classes)."""
    forward_gflop: float = 62.401
    """Of one image; counted by fpcn_dist/models/cost.py at 448 px."""
    channels: int = 2048
    """C: of the last feature map."""
    width: int = 512
    """D: hidden units."""
    classes: int = 3
    """K; parameters, pair_ns and image_us go with it."""
    pair_ns: float = 0.60
    """Nanoseconds of a pair, both sides, forward and backward; predicted for an H200 at K = 3."""
    image_us: float = 0.42
    """Microseconds of the contrast's dense products for an image; predicted for an H200 at K = 3."""
    pairs_per_image: float | None = None
    """Random pairs of the global batch over N; None takes all N^2."""

    peak_tflops: float = 989.5
    """Data sheet, bfloat16, dense."""
    fp32_tflops: float = 66.9
    """Data sheet; for listed pairs."""
    compute_efficiency: float = 0.25
    """Assumption: share of the peak that the backbone reaches."""
    gpus_per_node: int = 8
    """With an adapter of the network for each."""
    nvlink_gbytes: float = 450.0
    """Data sheet: per GPU and direction (900 GB/s both ways)."""
    network_gbytes: float = 50.0
    """Data sheet: per GPU and direction (400 Gb/s)."""
    network_efficiency: float = 0.7
    """Assumption: share of both that collectives reach."""
    nvlink_us: float = 2.0
    """Assumption: latency of a hop within a node."""
    network_us: float = 5.0
    """Assumption: latency of a hop between nodes."""
    bucket_mib: float = 25.0
    """DDP's default: the last bucket cannot hide behind the backward pass."""

    host_ms: float = 10.0
    """Host's share of a step: 1,007 operators (counted) at 10 us each (assumption)."""
    host_hop_us: float = 50.0
    """Assumption: a hop of gloo's ring over TCP, in which the sizes of the ranks' batches go round."""
    decode_ms: float = 4.62
    """CPU milliseconds an image of the data pipeline; measured (docs/results.md)."""
    cores_per_gpu: float = 12.0
    """Assumption: cores of the host for each GPU's pipeline."""

    def __post_init__(self) -> None:
        """Refuse what no machine or network has.

        Raises:
            UserError: a time is below 0, or another input is not above 0.
        """
        for field in fields(self):
            value, is_time = getattr(self, field.name), field.name.endswith(("_us", "_ns", "_ms"))
            if value is not None and not (value >= 0 if is_time else value > 0):
                reason = "is not 0 or more" if is_time else "is not above 0"
                hint = f"leave it out for {field.default}, or give your own"
                raise UserError(f"--model.{field.name.replace('_', '-')}", value, reason, hint)

    @property
    def node_bandwidth(self) -> float:
        """Bytes per second at which a ring through a node's GPUs runs within the node."""
        return self.nvlink_gbytes * 1e9 * self.network_efficiency

    @property
    def bandwidth(self) -> float:
        """The same across nodes, with one ring for each of a node's adapters."""
        adapters = self.gpus_per_node * self.network_gbytes * 1e9
        return min(self.nvlink_gbytes * 1e9, adapters) * self.network_efficiency


class StepPrediction(NamedTuple):
    """Seconds of a step's parts on ``gpus`` GPUs."""

    gpus: int
    images: int
    compute: float
    """Backbone, forward and backward."""
    pairs: float
    """The contrast's arithmetic."""
    exchange: float
    """u and v gathered, their gradients scattered; nothing else runs meanwhile."""
    center: float
    """Sums of the centre loss."""
    reduction: float
    """The gradients' sum, were it alone."""
    exposed: float
    """What of it the backward pass does not hide."""
    host: float
    feed: float

    @property
    def gpu(self) -> float:
        return self.compute + self.pairs + self.exchange + self.center + self.exposed

    @property
    def step(self) -> float:
        return max(self.gpu, self.host, self.feed)

    @property
    def bound(self) -> str:
        times = {"GPU": self.gpu, "host": self.host, "feed": self.feed}
        return max(times, key=times.__getitem__)

    @property
    def images_per_second(self) -> float:
        return self.images / self.step

    @property
    def contrast_share(self) -> float:
        """Of the GPU's time."""
        return (self.pairs + self.exchange) / self.gpu


def gradient_bytes(parameters: int, ranks: int) -> float:
    """That a rank sends in a step: a ring all-reduce of float32."""
    return 2 * (ranks - 1) / ranks * parameters * FLOAT


def contrast_bytes(images: int, width: int, ranks: int, *, ring: bool = False) -> float:
    """That a rank sends of u, v and their gradients, 2 D numbers an image; all ranks hold equally many images.

    In a ring the gradients make one move more than the rows: they come home.
    """
    moves = 2 * ranks - 1 if ring else 2 * (ranks - 1)
    return (moves if ranks > 1 else 0) / ranks * images * 2 * width * FLOAT


def center_bytes(classes: int, channels: int, ranks: int) -> float:
    """That a rank sends for the centre loss: float64 sums and counts of the classes, and one number of images."""
    return 2 * (ranks - 1) / ranks * (classes * (channels + 1) * DOUBLE + FLOAT)


def predict(inputs: Inputs, gpus: int) -> StepPrediction:
    """A step on ``gpus`` GPUs, each with the same number of images."""
    images = inputs.images_per_gpu * gpus
    flops = 3 * inputs.images_per_gpu * inputs.forward_gflop * 1e9
    compute = flops / (inputs.peak_tflops * 1e12 * inputs.compute_efficiency)
    exchanged = contrast_bytes(images, inputs.width, gpus) / _bandwidth(inputs, gpus)
    summed = center_bytes(inputs.classes, inputs.channels, gpus) / _bandwidth(inputs, gpus)
    reduction = _all_reduce(inputs, gpus, inputs.parameters * FLOAT)
    last_bucket = _all_reduce(inputs, gpus, min(inputs.bucket_mib * 2**20, inputs.parameters * FLOAT))
    return StepPrediction(
        gpus=gpus,
        images=images,
        compute=compute,
        pairs=_pairs(inputs, gpus),
        exchange=exchanged + 2 * _ring_latency(inputs, gpus),
        center=summed + 2 * _tree_latency(inputs, gpus),
        reduction=reduction,
        exposed=max(last_bucket, reduction - 2 / 3 * compute),
        host=inputs.host_ms * 1e-3 + (gpus - 1) * inputs.host_hop_us * 1e-6,
        feed=inputs.images_per_gpu * inputs.decode_ms * 1e-3 / inputs.cores_per_gpu,
    )


def first_beyond(inputs: Inputs, share: float, most: int = 2**16) -> int | None:
    """The fewest GPUs, in whole nodes, where the contrast takes more than ``share`` of the GPU's time."""
    counts = range(inputs.gpus_per_node, most + 1, inputs.gpus_per_node)
    return next((gpus for gpus in counts if predict(inputs, gpus).contrast_share > share), None)


def first_bound_by_host(inputs: Inputs, most: int = 2**16) -> int | None:
    """The fewest GPUs, in whole nodes, where the GPUs wait for the host."""
    counts = range(inputs.gpus_per_node, most + 1, inputs.gpus_per_node)
    return next((gpus for gpus in counts if predict(inputs, gpus).bound == "host"), None)


def _pairs(inputs: Inputs, gpus: int) -> float:
    """Seconds of a rank's share: N^2 / R pairs, or what a list of random ones costs where that is cheaper."""
    own = inputs.images_per_gpu
    images, channels, width, classes = own * gpus, inputs.channels, inputs.width, inputs.classes
    everything = images**2 / gpus * inputs.pair_ns * 1e-9 + own * inputs.image_us * 1e-6
    if inputs.pairs_per_image is None:
        return everything
    count = inputs.pairs_per_image * images
    # As pair_contrast decides it. A rank computes the pairs of which at least one image is its own.
    if count * channels >= (classes - 1) * images * (channels + 2 * images):
        return everything
    touched = count * (1 - (1 - 1 / gpus) ** 2)
    flops = touched * (6 * channels * width + 12 * classes * channels) + own * 12 * channels * width
    return flops / (inputs.fp32_tflops * 1e12)


def _bandwidth(inputs: Inputs, gpus: int) -> float:
    return inputs.node_bandwidth if gpus <= inputs.gpus_per_node else inputs.bandwidth


def _all_reduce(inputs: Inputs, gpus: int, size: float) -> float:
    return 2 * (gpus - 1) / gpus * size / _bandwidth(inputs, gpus) + _tree_latency(inputs, gpus)


def _ring_latency(inputs: Inputs, gpus: int) -> float:
    """Of an all-gather or reduce-scatter: a hop for each rank but one."""
    nodes = math.ceil(gpus / inputs.gpus_per_node)
    return ((gpus - nodes) * inputs.nvlink_us + (nodes - 1) * inputs.network_us) * 1e-6


def _tree_latency(inputs: Inputs, gpus: int) -> float:
    """Of an all-reduce: around the node's GPUs and up a tree of nodes, and back."""
    nodes = math.ceil(gpus / inputs.gpus_per_node)
    around = min(gpus, inputs.gpus_per_node) - 1
    return 2 * (around * inputs.nvlink_us + math.ceil(math.log2(nodes)) * inputs.network_us) * 1e-6
