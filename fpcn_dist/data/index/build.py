"""The building of a manifest: the images of a folder are found, checked, and split where they have no split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fpcn_dist.data.index.duplicates import describe_duplicates, drop_duplicates
from fpcn_dist.data.index.images import Check, Refused, cache_file, check_images
from fpcn_dist.data.index.layout import Candidate, find
from fpcn_dist.data.index.manifest import Image, Manifest
from fpcn_dist.data.index.notices import listed, show_refused
from fpcn_dist.data.sampler import check_composition
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError


def build_manifest(root: Path, config: DataConfig, seed: int) -> Manifest:
    """Index an image folder, check every image, and split what has no split.

    The split depends on the seed and on the contents of the images, not on their names: images that are added later
    leave nearly all the others where they were. Each class keeps at least one training image. Where images that were
    refused leave too few, they are printed before the error.

    Args:
        root: the data folder, in one of the two forms of :mod:`fpcn_dist.data.index.layout`.
        config: fractions of the split, pixel bound, what to do about bad images and duplicates, what a batch needs.
        seed: key of the split, unless the config has one of its own.

    Raises:
        UserError: no such folder, no classes or only one, a layout that is unclear, bad images where ``on_bad_image``
            is ``fail``, identical files where ``on_duplicate`` is, a class or a split of which no image can be used,
            too few classes or images for a batch, or a backend that is not installed.
    """
    root = Path(root)
    candidates, notices = find(root)
    paths = [root / c.path for c in candidates]
    checks = check_images(paths, config.max_pixels, cache_file(root), backend=config.backend)
    refused = [Refused(c.path, check.reason) for c, check in zip(candidates, checks, strict=True) if check.reason]
    if refused and config.on_bad_image == "fail":
        shown = "; ".join(f"{path}: {reason}" for path, reason in refused[:5]) + ("; ..." if len(refused) > 5 else "")
        hint = "mend or remove them, or set data.on_bad_image to 'skip'"
        raise UserError("--data", root, f"{len(refused)} image(s) cannot be used ({shown})", hint)

    usable = [(c, check) for c, check in zip(candidates, checks, strict=True) if check.ok]
    if config.on_duplicate == "drop":
        usable, dropped = drop_duplicates(usable)
        refused += dropped
    _require_usable(root, candidates, [c for c, _ in usable], refused)

    members: dict[str, list[tuple[Candidate, Check]]] = {}
    for member in usable:
        members.setdefault(member[0].name, []).append(member)
    given = {c.split for c in candidates}
    fractions = {} if "val" in given else {"val": config.val_fraction}
    if None in given:
        fractions["test"] = config.test_fraction
    classes = sorted(members)
    images = []
    for label, name in enumerate(classes):
        for c, check, split in _split(
            members[name], fractions, seed if config.split_seed is None else config.split_seed
        ):
            images.append(Image(c.path, label, split, check.size, check.digest))
    images.sort()
    duplicates = describe_duplicates(images, classes)
    if duplicates and config.on_duplicate == "fail":
        found = "; ".join(f"{notice.subject} {notice.text}" for notice in duplicates)
        hint = "remove them, or set data.on_duplicate to 'drop' or 'warn'"
        raise UserError("--data", root, found, hint)
    _require_batches(classes, images, config, refused)
    return Manifest(str(root.absolute()), tuple(classes), tuple(images), tuple(refused), (*notices, *duplicates))


def _require_usable(
    root: Path, candidates: Sequence[Candidate], usable: Sequence[Candidate], refused: Sequence[Refused]
) -> None:
    """Refuse a class without a training image, and a split without an image, that can be used; prints the refusals."""
    learnt = Counter(c.name for c in candidates if c.split in (None, "train"))
    lost = learnt.keys() - {c.name for c in usable if c.split in (None, "train")}
    what = [f"class {name!r} ({learnt[name]:,})" for name in sorted(lost)]
    measured = Counter(c.split for c in candidates if c.split in ("val", "test"))
    what += [f"split {split} ({measured[split]:,})" for split in measured.keys() - {c.split for c in usable}]
    if what:
        show_refused(refused)
        reasons = Counter(reason for _, reason in refused).most_common(1)[0][0]
        reason = f"all images were refused of {listed(what)}; the commonest reason: {reasons}"
        raise UserError("--data", root, reason, "mend or replace the files of the table above, or move the folder away")


def _require_batches(
    classes: Sequence[str], images: Sequence[Image], config: DataConfig, refused: Sequence[Refused]
) -> None:
    """Refuse data of which no batch can be made; where images were refused, they are printed and named as the cause."""
    counts = Counter(image.label for image in images if image.split == "train")
    try:
        check_composition(classes, [counts[label] for label in range(len(classes))], config)
    except UserError as error:
        if not refused:
            raise
        show_refused(refused)
        reason = f"{error.reason}; {len(refused):,} image(s) of the data were refused"
        raise UserError(error.field, error.value, reason, f"mend those, or {error.hint}") from None


def _split(
    members: Sequence[tuple[Candidate, Check]], fractions: dict[str, float], seed: int
) -> Iterator[tuple[Candidate, Check, str]]:
    """The images of one class with their splits: the folder's, or one that the contents and the seed decide."""

    def lot(member: tuple[Candidate, Check]) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}/{member[1].digest}".encode()).digest(), member[0].path

    train = sorted((member for member in members if member[0].split in (None, "train")), key=lot)
    yield from ((c, check, c.split) for c, check in members if c.split in ("val", "test"))
    taken = 0
    for split, fraction in fractions.items():
        count = min(max(1, round(fraction * len(train))) if fraction else 0, max(0, len(train) - 1 - taken))
        yield from ((c, check, split) for c, check in train[taken : taken + count])
        taken += count
    yield from ((c, check, "train") for c, check in train[taken:])
