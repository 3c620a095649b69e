"""What a view of an image is: where it is cut and what is changed, in numbers that both decoding backends are handed.

A training view is a pure function of (seed, image id, view number), whatever the step, the rank and the process. All of
its numbers are drawn here; :mod:`fpcn_dist.data.augmentation` makes the pixels.
"""

from __future__ import annotations

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
    ]
)
"""The numbers of a view.

down, right: where the crop lies, as shares of the room that it has: 0 at the top left, 1 at the bottom right.
flip: 1 where it is mirrored left to right.
scale, ratio: share of the area and width over height of a random resized crop; scale 0 is a crop of the usual scale.
brightness, contrast, saturation: factors; 1 changes nothing. hue: share of a turn.
"""

Views = NDArray[np.void]
CROP = ("down", "right", "flip", "scale", "ratio")
"""The fields that say where a view was cut."""

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
    return result


def centre_views(count: int) -> Views:
    """The views of evaluation and prediction, [count]: the central crop, of the usual scale, nothing changed."""
    result = _plain(count)
    result["down"] = result["right"] = 0.5
    return result


def crops(views: Views) -> NDArray[np.float64]:
    """Where views were cut, [n, 5]: their fields :data:`CROP`."""
    return np.stack([views[name] for name in CROP], axis=1)


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
    return (_raw(seed, Purpose.AUGMENT, image_ids, view_ids, _UNIFORM) >> np.uint64(11)) * 2.0**-53


def _log_uniform(low: float, high: float, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    return low * np.exp(uniform * np.log(high / low))
