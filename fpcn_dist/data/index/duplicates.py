"""The same picture twice: files of identical contents, which blur what is measured, or contradict one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from fpcn_dist.data.index.check.images import Check, Refused
from fpcn_dist.data.index.folder.layout import Candidate
from fpcn_dist.data.index.manifest import Image
from fpcn_dist.data.index.notices import Notice
from fpcn_dist.runtime.names import first_few, printable

T = TypeVar("T")

_STAYS = {"test": 0, "val": 1, "train": 2, None: 2}
"""Of several copies the first in this order stays, so that what is measured has not been learnt."""


def drop_duplicates(
    found: Sequence[tuple[Candidate, Check]],
) -> tuple[list[tuple[Candidate, Check]], list[Refused]]:
    """Keep one file of each content: a test image before one of validation, that before one of training, then by path.

    Of a content that is in two classes no file is kept: one of its labels is wrong, and nobody knows which.

    Returns:
        What stays, in the given order, and what goes, with the reason.
    """
    gone: dict[str, str] = {}
    for copies in _repeated(found, lambda one: one[1].digest):
        stays = min((c for c, _ in copies), key=lambda c: (_STAYS[c.split], c.path))
        contradicting = len({c.name for c, _ in copies}) > 1
        for c, _ in copies:
            if contradicting:
                other = next(o.path for o, _ in copies if o.name != c.name)
                gone[c.path] = f"the same picture as {other}, which is in another class"
            elif c is not stays:
                gone[c.path] = f"the same picture as {stays.path}, which stays"
    kept = [(c, check) for c, check in found if c.path not in gone]
    return kept, [Refused(path, reason) for path, reason in gone.items()]


def describe_duplicates(images: Sequence[Image], classes: Sequence[str]) -> list[Notice]:
    """Count the contents that are there more than once: in two classes, in two splits, and within a class and split."""
    by_classes: dict[tuple[str, ...], list[list[Image]]] = {}
    by_splits: dict[tuple[str, ...], list[list[Image]]] = {}
    within = []
    for copies in _repeated(images, lambda image: image.digest):
        labels = sorted({image.label for image in copies})
        splits = sorted({image.split for image in copies}, key=lambda split: -_STAYS[split])
        if len(labels) > 1:
            by_classes.setdefault(tuple(classes[label] for label in labels), []).append(copies)
        if len(splits) > 1:
            by_splits.setdefault(tuple(splits), []).append(copies)
        if len(labels) == len(splits) == 1:
            within.append(copies)
    notices = []
    if by_classes:
        text = f"in two classes or more, so that labels contradict one another: {_counted(by_classes)}"
        notices.append(Notice("identical files", text))
    if by_splits:
        text = f"in two splits or more, so that what is measured was learnt by heart: {_counted(by_splits)}"
        notices.append(Notice("identical files", text))
    if within:
        text = f"within a class and split: {len(within):,} picture(s), such as {_paths(within[0])}"
        notices.append(Notice("identical files", text))
    return notices


def _repeated(items: Iterable[T], digest: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(digest(item), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def _counted(groups: dict[tuple[str, ...], list[list[Image]]]) -> str:
    """How many pictures each group of classes or splits shares, the most first, with an example."""
    counts = Counter({" and ".join(names): len(found) for names, found in groups.items()})
    example = max(groups.values(), key=len)[0]
    shared = first_few(f"{count:,} picture(s) in {names}" for names, count in counts.most_common())
    return f"{shared}; such as {_paths(example)}"


def _paths(copies: Sequence[Image]) -> str:
    return " and ".join(printable(image.path) for image in copies[:2])
