"""What a view of an image is: where it is cut and what is changed, in numbers that both decoding backends are handed.

A training view is a pure function of (seed, image id, view number), whatever the step, the rank and the process. All of
its numbers are drawn here; :mod:`fpcn_dist.data.augmentation` makes the pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fpcn_dist.data.sampler import Ids, Purpose, draw
from fpcn_dist.recipe.augment import AugmentConfig
from fpcn_dist.recipe.schema import DataConfig

VIEW = np.dtype(
    [
        ("down", "f8"),
        ("right", "f8"),
        ("flip", "f8"),
        ("scale", "f8"),
        ("ratio", "f8"),
        ("brightness", "f8"),
        ("contrast", "f8"),
        ("saturation", "f8"),
        ("hue", "f8"),
        ("operations", "f8", 2),
        ("magnitudes", "f8", 2),
        ("erased", "f8", 4),
    ]
)
"""The numbers of a view.

down, right: where the crop lies, as shares of the room that it has: 0 at the top left, 1 at the bottom right.
flip: 1 where it is mirrored left to right.
scale, ratio: share of the area and width over height of a random resized crop; scale 0 is a crop of the usual scale.
brightness, contrast, saturation: factors; 1 changes nothing. hue: share of a turn.
operations, magnitudes: what a policy does, as places in :data:`OPERATIONS`, and how much, in the unit of each.
erased: top, left, height and width in pixels of the rectangle that is blackened; height 0 where there is none.
"""

Views = NDArray[np.void]
CROP = ("down", "right", "flip", "scale", "ratio")
"""The fields that say where a view was cut."""

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
"""The operations of TrivialAugmentWide (Mueller and Hutter 2021) and of RandAugment (Cubuk et al. 2020)."""
_SIGNED = OPERATIONS.index("Sharpness")
"""Up to it, an operation goes either way."""
_MAGNITUDES = 31
_RAND_MAGNITUDE = 9
_ERASED_AREA, _ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
"""Of random erasing (Zhong et al. 2020)."""

_ROOM = 4096
"""Steps that a position is drawn in where the room depends on the image, too fine for a pixel to be left out."""
_UNIFORM = 32
"""Numbers of the stream of a view's augmentation. Each has its place, so that none depends on what else is used."""


def views(seed: int, image_ids: Ids, view_ids: Ids, config: DataConfig) -> Views:
    """The training views of images: a function of (seed, image id, view number) alone.

    Args:
        seed: key of all random draws.
        image_ids: [n] ids.
        view_ids: [n] view numbers.
        config: sizes, and what views may change.

    Returns:
        [n] of :data:`VIEW`.
    """
    augment = config.augment
    resized = augment.random_resized_crop is not None
    room = _ROOM if resized or config.fit == "short_side" else config.resize - config.crop
    spans = np.array([room + 1, room + 1, 1 + config.flip], dtype=np.uint64)
    place = (_raw(seed, Purpose.VIEW, image_ids, view_ids, 3) % spans).astype(np.float64)
    result = _plain(len(image_ids))
    result["down"], result["right"] = (place[:, :2] / max(room, 1)).T
    result["flip"] = place[:, 2]
    if augment == AugmentConfig():
        return result
    uniform = _uniform(seed, image_ids, view_ids)
    if augment.random_resized_crop is not None:
        low, high = augment.random_resized_crop
        result["scale"] = low + (high - low) * uniform[:, 0]
        result["ratio"] = _log_uniform(*augment.ratio, uniform[:, 1])
    for column, name in enumerate(("brightness", "contrast", "saturation"), start=2):
        deviation = getattr(augment, name)
        low, high = max(0.0, 1 - deviation), 1 + deviation
        result[name] = low + (high - low) * uniform[:, column]
    result["hue"] = augment.hue * (2 * uniform[:, 5] - 1)
    if augment.policy != "none":
        _draw_policy(result, uniform[:, 6:12], augment.policy, config.crop)
    if augment.erasing:
        _draw_erased(result, uniform[:, 12:17], augment.erasing, config.crop)
    return result


def centre_views(count: int) -> Views:
    """The views of evaluation and prediction, [count]: the central crop, of the usual scale, nothing changed."""
    result = _plain(count)
    result["down"] = result["right"] = 0.5
    return result


def crops(views: Views) -> NDArray[np.float64]:
    """Where views were cut, [n, 5]: their fields :data:`CROP`."""
    return np.stack([views[name] for name in CROP], axis=1)


def _draw_policy(result: Views, uniform: NDArray[np.float64], policy: str, side: int) -> None:
    """Operation, magnitude and sign: one of each for TrivialAugmentWide, two for RandAugment."""
    for turn in range(1 if policy == "trivial" else 2):
        which, how_much, sign = uniform[:, 3 * turn : 3 * turn + 3].T
        operations = (which * len(OPERATIONS)).astype(np.int64)
        steps = (
            (how_much * _MAGNITUDES).astype(np.int64)
            if policy == "trivial"
            else np.full_like(operations, _RAND_MAGNITUDE)
        )
        amounts = _amounts(policy, side)[operations, steps]
        negative = (sign < 0.5) & (operations <= _SIGNED)
        result["operations"][:, turn] = operations
        result["magnitudes"][:, turn] = np.where(negative, -amounts, amounts)


def _amounts(policy: str, side: int) -> NDArray[np.float64]:
    """[operations, _MAGNITUDES] in the unit of each: slope, pixels, degrees, factor - 1, bits, share of white."""
    wide = policy == "trivial"
    largest = {
        "ShearX": 0.99 if wide else 0.3,
        "TranslateX": 32.0 if wide else 150 / 331 * side,
        "Rotate": 135.0 if wide else 30.0,
        "Brightness": 0.99 if wide else 0.9,
    }
    largest |= {"ShearY": largest["ShearX"], "TranslateY": largest["TranslateX"]}
    largest |= dict.fromkeys(("Color", "Contrast", "Sharpness"), largest["Brightness"])
    rising = np.linspace(0, 1, _MAGNITUDES)
    table = np.stack([largest.get(name, 0.0) * rising for name in OPERATIONS])
    table[OPERATIONS.index("Posterize")] = (8 - rising * (6 if wide else 4)).round()
    table[OPERATIONS.index("Solarize")] = 1 - rising
    return table


def _draw_erased(result: Views, uniform: NDArray[np.float64], probability: float, side: int) -> None:
    happens, area, ratio, down, right = uniform.T
    low, high = _ERASED_AREA
    share, shape = low + (high - low) * area, _log_uniform(*_ERASED_RATIO, ratio)
    lengths = [np.clip((side * np.sqrt(value)).round(), 1, side) for value in (share / shape, share * shape)]
    corners = [np.floor(place * (side - length + 1)) for place, length in zip((down, right), lengths, strict=True)]
    result["erased"] = np.where((happens < probability)[:, None], np.stack([*corners, *lengths], axis=1), 0)


def _plain(count: int) -> Views:
    result = np.zeros(count, dtype=VIEW)
    for name in ("ratio", "brightness", "contrast", "saturation"):
        result[name] = 1
    return result


def _raw(seed: int, purpose: Purpose, image_ids: Ids, view_ids: Ids, count: int) -> NDArray[np.uint64]:
    pairs = zip(image_ids.tolist(), view_ids.tolist(), strict=True)
    raw = [draw(count, seed, purpose, image_id, view_id) for image_id, view_id in pairs]
    return np.array(raw, dtype=np.uint64).reshape(-1, count)


def _uniform(seed: int, image_ids: Ids, view_ids: Ids) -> NDArray[np.float64]:
    """[n, _UNIFORM] numbers in [0, 1)."""
    raw = _raw(seed, Purpose.AUGMENT, image_ids, view_ids, _UNIFORM)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _log_uniform(low: float, high: float, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    return low * np.exp(uniform * math.log(high / low))
