"""Which images make a batch: pure functions of the seed and a few counters, as are views (:mod:`fpcn_dist.data.views`).

Nothing here has a state or a history. Step k can be asked for before step k - 1, on any rank of any number of ranks,
and in a process that was started a second ago; that is what makes a restart exact. Randomness comes from the raw output
of Philox, a counter-based generator whose stream NumPy guarantees for good, keyed by (seed, purpose, two counters).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError

Ids = NDArray[np.int64]


class Purpose(IntEnum):
    """What a stream of random numbers decides; streams of different purposes are independent."""

    CLASSES = 1
    IMAGES = 2
    VIEW = 3
    SUBSTITUTE = 4
    AUGMENT = 5
    MIX = 6


def draw(count: int, seed: int, purpose: Purpose, major: int, minor: int = 0) -> NDArray[np.uint64]:
    """``count`` random 64-bit numbers of the stream (seed, purpose, major, minor), each argument below 2^32."""
    return np.random.Philox(key=[purpose << 32 | seed, major << 32 | minor]).random_raw(count)


def _permutation(count: int, seed: int, purpose: Purpose, major: int, minor: int = 0) -> Ids:
    """A random order of ``range(count)``."""
    return np.argsort(draw(count, seed, purpose, major, minor), kind="stable")


def check_composition(classes: Sequence[str], counts: Sequence[int], config: DataConfig) -> None:
    """Refuse data of which no class-balanced batch can be made.

    Args:
        classes: class names.
        counts: training images of each class.
        config: asks for ``images_per_class`` images of each class that a batch shows.

    Raises:
        UserError: a batch needs more images of a class than it has.
    """
    name, count = min(zip(classes, counts, strict=True), key=lambda pair: pair[1])
    if config.images_per_class is not None and count < config.images_per_class:
        reason = f"class {name!r} has {count} training image(s), but a batch needs {config.images_per_class} of a class"
        hint = f"add images of {name!r}" + (f", or lower it to at most {count}" if count else "")
        raise UserError("data.images_per_class", config.images_per_class, reason, hint)


def check_whole_division(images: int, world_size: int) -> None:
    """Refuse a batch of all training images that cannot be cut into equal shares.

    Raises:
        UserError: the images do not divide by the ranks; names a number of ranks that does.
    """
    if images % world_size:
        fitting = max(ranks for ranks in range(1, world_size) if images % ranks == 0)
        reason = f"all {images} training images do not divide by {world_size} ranks"
        raise UserError("data.images_per_class", None, reason, f"start {fitting} rank(s), or give a number")


def check_division(classes_per_batch: int, images_per_class: int, world_size: int) -> None:
    """Refuse a global batch that cannot be cut into equal shares.

    Raises:
        UserError: classes x images does not divide by the ranks; names the nearest numbers of images that would.
    """
    size = classes_per_batch * images_per_class
    if size % world_size:
        step = world_size // math.gcd(classes_per_batch, world_size)
        below = images_per_class // step * step
        choices = [below, below + step] if below else [step]
        reason = f"{images_per_class} x {classes_per_batch} classes = {size} images do not divide by {world_size} ranks"
        hint = f"try {' or '.join(map(str, choices))}"
        raise UserError("data.images_per_class", images_per_class, reason, hint)


class BalancedSampler:
    """Class-balanced global batches: n classes times m images of each, every batch a pure function of its step.

    Classes: K classes are dealt out in rounds of K steps. A round fixes an order of the classes and goes round it n
    times, n classes a step, so that the classes of a batch differ and each class appears n times per round.
    Images: the appearances of a class run through passes. A pass shuffles the images of the class and hands them out m
    at a time; the remainder, fewer than m, sits this pass out. The number of the pass is the view number.
    Order: the first image of every class, then the second of every class, and so on, so that any contiguous share of
    the batch is about as balanced as the whole.

    Args:
        classes: [K] class names, for messages.
        image_ids: [K] arrays of the training images of each class.
        config: ``classes_per_batch`` and ``images_per_class``.
        seed: key of all random draws.

    Raises:
        UserError: see :func:`check_composition`.
    """

    def __init__(self, classes: Sequence[str], image_ids: Sequence[Ids], config: DataConfig, seed: int) -> None:
        check_composition(classes, [len(ids) for ids in image_ids], config)
        assert config.images_per_class is not None, "else see WholeSampler"
        self._image_ids, self._seed = image_ids, seed
        self.classes_per_batch = config.classes_in_batch(len(classes))
        self.images_per_class = config.images_per_class
        self.batch_size = self.classes_per_batch * self.images_per_class

    def batch(self, step: int) -> tuple[Ids, Ids]:
        """Image ids and view numbers, [batch_size] each, of the global batch of a step (counted from 0)."""
        chosen = [self._block(*appearance) for appearance in self._appearances(step)]
        image_ids, view_ids = zip(*chosen, strict=True)
        return np.stack(image_ids, axis=1).ravel(), np.stack(view_ids, axis=1).ravel()

    def _appearances(self, step: int) -> list[tuple[int, int]]:
        """The classes of a step, each with the number of its earlier appearances."""
        num_classes, per_batch = len(self._image_ids), self.classes_per_batch
        round_, step_of_round = divmod(step, num_classes)
        order = _permutation(num_classes, self._seed, Purpose.CLASSES, round_)
        start = step_of_round * per_batch
        appearances = []
        for turn in range(start, start + per_batch):
            turns_of_class, position = divmod(turn, num_classes)
            appearances.append((int(order[position]), round_ * per_batch + turns_of_class))
        return appearances

    def _block(self, label: int, appearance: int) -> tuple[Ids, Ids]:
        """The [images_per_class] images that a class shows at an appearance, and their view numbers."""
        ids, size = self._image_ids[label], self.images_per_class
        pass_, block = divmod(appearance, len(ids) // size)
        order = _permutation(len(ids), self._seed, Purpose.IMAGES, label, pass_)
        return ids[order[block * size : (block + 1) * size]], np.full(size, pass_, dtype=np.int64)


class WholeSampler:
    """Batches of all training images, in another order at every step; the number of the step is the view number.

    Args:
        image_ids: the training images.
        classes: their number; it keeps the streams of the orders apart from those of :class:`BalancedSampler`.
        seed: key of all random draws.
    """

    def __init__(self, image_ids: Ids, classes: int, seed: int) -> None:
        self._image_ids, self._classes, self._seed = image_ids, classes, seed
        self.batch_size = len(image_ids)

    def batch(self, step: int) -> tuple[Ids, Ids]:
        """Image ids and view numbers, [batch_size] each, of a step (counted from 0)."""
        order = _permutation(self.batch_size, self._seed, Purpose.IMAGES, self._classes, step)
        return self._image_ids[order], np.full(self.batch_size, step, dtype=np.int64)


def share(batch: NDArray, rank: int, world_size: int) -> NDArray:
    """The contiguous part of a global batch, [B, ...], that belongs to a rank; B divides by ``world_size``."""
    size = len(batch) // world_size
    return batch[rank * size : (rank + 1) * size]


def substitutes(seed: int, image_id: int, step: int, candidates: Ids) -> Ids:
    """The order in which ``candidates`` stand in for an image that turned unreadable, at a step."""
    return candidates[_permutation(len(candidates), seed, Purpose.SUBSTITUTE, image_id, step)]
