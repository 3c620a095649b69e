"""A small FPCN learns synthetic photographs on each backend: the kernels' loss curves must be PyTorch's up to what
another seed would change. Needs torch and the kernels alone.

Legend: B images, S pixels of a side, K classes, N seeds, T steps, W windows of steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from fpcn_kernels import PairHead, masked_pool, pair_contrast
from torch import Tensor, nn

CLASSES = 3
WINDOW = 25
STEPS = 200


class Way(NamedTuple):
    """How a step is computed."""

    name: str
    backend: str
    precision: str
    """Of float32 products: see :func:`torch.set_float32_matmul_precision`."""


PYTORCH = Way("PyTorch", "torch", "highest")
WAYS = (PYTORCH, Way("Triton, highest", "triton", "highest"), Way("Triton, high", "triton", "high"))


class Photographs(NamedTuple):
    pixels_B3SS: Tensor
    labels_B: Tensor


def photographs(images: int, side: int, device: torch.device) -> Photographs:
    """Noise with a disc anywhere, whose stripes have the direction of its class and any colour."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(images, *shape).uniform_(low, high, generator=generator)[..., None, None]

    labels_B = torch.arange(images) % CLASSES
    y_SS, x_SS = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    inside_BSS = (x_SS - uniform(0.3, 0.7)) ** 2 + (y_SS - uniform(0.3, 0.7)) ** 2 < uniform(0.2, 0.35) ** 2
    angle_B11 = labels_B[:, None, None] * math.pi / CLASSES + uniform(-0.1, 0.1)
    along_BSS = x_SS * angle_B11.cos() + y_SS * angle_B11.sin()
    stripes_BSS = torch.sin(side * along_BSS + uniform(0, 2 * math.pi))
    pixels_B3SS = inside_BSS[:, None] * (stripes_BSS[:, None] + uniform(-0.5, 0.5, 3))
    pixels_B3SS += 0.3 * torch.randn(images, 3, side, side, generator=generator)
    return Photographs(pixels_B3SS.to(device), labels_B.to(device))


class SmallFPCN(nn.Module):
    """Equations 1 to 9 and 12 on a backbone of four convolutions; gives the loss of a batch."""

    def __init__(self, channels: int = 128, hidden: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, 32, 64, 128, channels)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.fuse_in = nn.Linear(2 * channels, hidden)
        self.fuse_out = nn.Linear(hidden, channels)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, batch: Photographs, backend: str) -> Tensor:
        features = self.backbone(batch.pixels_B3SS)
        pooled = masked_pool(features, theta=0.1, region="largest", backend=backend).pooled
        return pair_contrast(
            pooled, batch.labels_B, PairHead.of(self.fuse_in, self.fuse_out, self.classifier), backend=backend
        )


def curve(way: Way, seed: int, everything: Photographs, *, batch: int = 32, steps: int = STEPS) -> Tensor:
    """Loss of every step [T] of a training whose weights and batches are functions of the seed."""
    device = everything.labels_B.device
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(way.precision)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = SmallFPCN().to(device)
            order_TB = torch.stack([torch.randperm(len(everything.labels_B))[:batch] for _ in range(steps)]).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses = []
        for chosen_B in order_TB:
            loss = model(Photographs(*(tensor[chosen_B] for tensor in everything)), way.backend)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).cpu()
    finally:
        torch.set_float32_matmul_precision(before)


def windows(curves_NT: Tensor) -> Tensor:
    """Means [N, W] of windows of steps."""
    return curves_NT.unfold(1, min(WINDOW, curves_NT.shape[1]), WINDOW).mean(2)


def distance_in_spreads(curves_NT: Tensor, expected_NT: Tensor) -> float:
    """How far the mean curve is from the expected one: at most, over the windows, in units of what the expected curves
    differ by between seeds (the largest less the smallest)."""
    got_NW, expected_NW = windows(curves_NT), windows(expected_NT)
    spread_W = expected_NW.amax(0) - expected_NW.amin(0)
    return float(((got_NW.mean(0) - expected_NW.mean(0)).abs() / spread_W).max())


def all_curves(
    everything: Photographs, seeds: int, *, batch: int = 32, steps: int = STEPS, ways: Sequence[Way] = WAYS
) -> dict[str, Tensor]:
    """The curves [N, T] of every way by its name."""
    options = {"batch": batch, "steps": steps}
    return {way.name: torch.stack([curve(way, seed, everything, **options) for seed in range(seeds)]) for way in ways}
