"""The building of a manifest: the images at ``--data`` are found, checked, and split where they have no split."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.check.images import Check, Refused, cache_file, check_images
from fpcn_dist.data.index.check.salvage import SALVAGED, salvage
from fpcn_dist.data.index.duplicates import describe_duplicates, drop_duplicates
from fpcn_dist.data.index.folder.layout import Candidate
from fpcn_dist.data.index.manifest import Image, Manifest, folder_of
from fpcn_dist.data.index.notices import Notice, show_refused
from fpcn_dist.data.index.shapes.recognise import recognise
from fpcn_dist.data.remote.reading import bound_cache
from fpcn_dist.data.sampler import check_composition
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import first_few


@contextlib.contextmanager
def _without_full_collections() -> Iterator[None]:
    """Let Python's collector leave old objects alone: it would search a million of them for cycles many times over."""
    before = gc.get_threshold()
    gc.set_threshold(before[0], before[1], 1 << 30)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_without_full_collections()
def build_manifest(root: Address, config: DataConfig, seed: int) -> Manifest:
    """Index images, check every one, and split what has no split.

    The split depends on the seed and on the contents of the images, not on their names: images that are added later
    leave nearly all the others where they were. Each class keeps at least one training image. Images of one group stay
    together, and so do copies of one image. Where images that were refused leave too few, they are printed before the
    error.

    Args:
        root: a folder of images in one of the forms of :mod:`fpcn_dist.data.index.folder.layout`, on this machine or
            remote, or another shape of data set that :mod:`fpcn_dist.data.index.shapes` knows.
        config: fractions of the split, pixel bound, what to do about bad images and duplicates, what a batch needs.
        seed: key of the split, unless the config has one of its own.

    Raises:
        UserError: no such folder, no classes or only one, a layout that is unclear, bad images where ``on_bad_image``
            is ``fail``, identical files where ``on_duplicate`` is, a class or a split of which no image can be used,
            too few classes or images for a batch, or a backend that is not installed.
    """
    bound_cache(config.cache_gib)
    found = recognise(root, config.columns).find()
    candidates, folder = found.candidates, folder_of(str(root))
    blobs = [Blob.within(folder, c.path, c.place)._replace(stored=found.stored.get(c.path)) for c in candidates]
    checks = check_images(blobs, config.max_pixels, cache_file(root), backend=config.backend)
    salvaged: list[int] = []
    if config.on_bad_image == "salvage":
        checks, salvaged = salvage(blobs, checks, config.max_pixels)
    refused = [*found.refused]
    refused += [Refused(c.path, check.reason) for c, check in zip(candidates, checks, strict=True) if check.reason]
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
    images, split_of = [], {}
    for label, name in enumerate(classes):
        _split(members[name], fractions, seed if config.split_seed is None else config.split_seed, split_of)
        for c, check in members[name]:
            images.append(Image(c.path, label, split_of[_unit((c, check))], check.size, check.digest, c.place))
    images.sort()
    duplicates = describe_duplicates(images, classes)
    if duplicates and config.on_duplicate == "fail":
        shown = "; ".join(f"{notice.subject} {notice.text}" for notice in duplicates)
        hint = "remove them, or set data.on_duplicate to 'drop' or 'warn'"
        raise UserError("--data", root, shown, hint)
    _require_batches(classes, images, config, refused)
    notices = (*found.notices, *duplicates, *(Notice(candidates[index].path, SALVAGED) for index in salvaged))
    return Manifest(str(root.absolute()), tuple(classes), tuple(images), tuple(refused), notices)


def _require_usable(
    root: Address, candidates: Sequence[Candidate], usable: Sequence[Candidate], refused: Sequence[Refused]
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
        reason = f"all images were refused of {first_few(what)}; the commonest reason: {reasons}"
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


def _unit(member: tuple[Candidate, Check]) -> tuple[str | None, str | None, str]:
    """What has one split: a group, or the files of one content; where splits are given, in each of them by itself."""
    candidate, check = member
    if candidate.split in ("val", "test") or candidate.group is None:
        return candidate.split, None, check.digest
    return candidate.split, candidate.group, ""


def _split(
    members: Sequence[tuple[Candidate, Check]],
    fractions: dict[str, float],
    seed: int,
    split_of: dict[tuple[str | None, str | None, str], str],
) -> None:
    """Give the images of one class their splits: the data's, or those that the contents and the seed decide.

    Groups and copies that other classes have, too, stay where ``split_of``, which is added to, already has them. Those
    that are too many for what a split still needs are passed over, save where the split would stay empty.
    """

    def lot(member: tuple[Candidate, Check]) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}/{member[1].digest}".encode()).digest(), member[0].path

    split_of |= {_unit(member): member[0].split for member in members if member[0].split in ("val", "test")}
    train = sorted((member for member in members if member[0].split in (None, "train")), key=lot)
    sizes = Counter(map(_unit, train))  # in the order of their lots
    taken = 0
    for split, fraction in fractions.items():
        count = min(max(1, round(fraction * len(train))) if fraction else 0, max(0, len(train) - 1 - taken))
        before = sum(size for unit, size in sizes.items() if split_of.get(unit) == split)
        free, left = {unit: size for unit, size in sizes.items() if unit not in split_of}, count - before
        for unit, size in free.items():
            if size <= left:
                split_of[unit] = split
                left -= size
        if count and left == count and len(free) > 1:
            split_of[min(free, key=lambda unit: free[unit])] = split
        taken = sum(size for unit, size in sizes.items() if split_of.get(unit, "train") != "train")
    split_of |= {unit: "train" for unit in sizes if unit not in split_of}
