"""Mixup and cutmix: the images of a batch mixed in pairs, after decoding, on the device.

The mixture is a pure function of (seed, step), and a pair are neighbours in the global batch, which the sampler has
shuffled: neighbours are of different classes (wherever a batch has several), and lie on the same rank for any number of
ranks whose shares are even. So nothing is sent, and nothing is decoded twice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fpcn_dist.data.sampler import Purpose, draw
from fpcn_dist.recipe.augment import AugmentConfig
from fpcn_dist.runtime.errors import UserError


class Mixture(NamedTuple):
    """How the images of a step are mixed.

    Attributes:
        share: what each image keeps of itself, in [0, 1].
        box: first row, first column, and those behind the last, of the part that shows the neighbour (cutmix); ``None``
            where both show everywhere (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None


def check_pairs(batch_size: int, world_size: int, config: AugmentConfig) -> None:
    """Refuse to mix where an image's neighbour lies on another rank.

    Raises:
        UserError: a rank's share of the global batch is odd.
    """
    if config.mixes and batch_size // world_size % 2:
        name = "mixup" if config.mixup else "cutmix"
        reason = f"images are mixed in pairs, but each of {world_size} rank(s) has {batch_size // world_size}"
        hint = "change data.images_per_class or the number of ranks"
        raise UserError(f"data.augment.{name}", getattr(config, name), reason, hint)


def mixture(seed: int, step: int, side: int, config: AugmentConfig) -> Mixture | None:
    """The mixture of a step: a function of (seed, step) alone; ``None`` where the recipe mixes nothing.

    Args:
        seed: key of all random draws.
        step: counted from 0.
        side: of the images, in pixels.
        config: alphas of mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019).
    """
    if not config.mixes:
        return None
    cut, row, column = (draw(3, seed, Purpose.MIX, step) >> np.uint64(11)) * 2.0**-53
    cuts = cut < 0.5 if config.mixup and config.cutmix else config.cutmix > 0
    # RandomState's algorithms are frozen for good, unlike a Generator's.
    bits = np.random.Philox(key=[Purpose.MIX << 32 | seed, step << 32 | 1])
    alpha = config.cutmix if cuts else config.mixup
    share = float(np.random.RandomState(bits).beta(alpha, alpha))
    if not cuts:
        return Mixture(share, None)
    half = math.sqrt(1 - share) * side / 2
    top, left = (round(max(centre * side - half, 0)) for centre in (row, column))
    bottom, right = (round(min(centre * side + half, side)) for centre in (row, column))
    return Mixture(1 - (bottom - top) * (right - left) / side**2, (top, left, bottom, right))


def mix(images: Tensor, labels: Tensor, num_classes: int, how: Mixture) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour: the first with the second, the third with the fourth, and so on.

    Args:
        images: [B, 3, H, W], B even.
        labels: [B] int64.
        num_classes: K.
        how: the mixture.

    Returns:
        images: [B, 3, H, W].
        targets: [B, K] float32, the share of each class.
    """
    neighbours = torch.arange(len(images), device=images.device) ^ 1
    own, others = F.one_hot(labels, num_classes).float(), images[neighbours]
    targets = how.share * own + (1 - how.share) * own[neighbours]
    if how.box is None:
        return torch.lerp(others, images, how.share), targets
    top, left, bottom, right = how.box
    cut = images.clone()
    cut[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return cut, targets
