"""The building of a manifest: the images of a folder are found, checked, and split where they have no split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.images import Check, Refused, Salvaged, cache_file, check_images, salvage_images
from fpcn_dist.data.index.layout import Candidate, find
from fpcn_dist.data.index.manifest import Image, Manifest
from fpcn_dist.data.sampler import check_composition
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError


def build_manifest(root: Path, config: DataConfig, seed: int) -> Manifest:
    """Index an image folder, check every image, and split what has no split.

    The split depends on the seed and on the contents of the images, not on their names: images that are added later
    leave nearly all the others where they were. Each class keeps at least one training image.

    Args:
        root: the data folder, in one of the two forms of :mod:`fpcn_dist.data.index.layout`.
        config: fractions of the split, pixel bound, what to do about bad images, what a batch needs.
        seed: key of the split, unless the config has one of its own.

    Raises:
        UserError: no such folder, no classes or only one, classes that differ between splits, bad images where
            ``on_bad_image`` is ``fail``, too few classes or images for a batch, or a backend that is not installed.
    """
    root = Path(root)
    candidates = find(root)
    paths = [root / c.path for c in candidates]
    checks = check_images(paths, config.max_pixels, cache_file(root), backend=config.backend)
    missing: dict[int, str] = {}
    if config.on_bad_image == "salvage":
        checks, missing = salvage_images(Blob.of_files(paths), checks, config.max_pixels)
    refused = [Refused(c.path, check.reason) for c, check in zip(candidates, checks, strict=True) if check.reason]
    if refused and config.on_bad_image == "fail":
        shown = "; ".join(f"{path}: {reason}" for path, reason in refused[:5]) + ("; ..." if len(refused) > 5 else "")
        hint = "mend or remove them, or set data.on_bad_image to 'skip'"
        raise UserError("--data", root, f"{len(refused)} image(s) cannot be used ({shown})", hint)

    given = {c.split for c in candidates}
    fractions = {} if "val" in given else {"val": config.val_fraction}
    if None in given:
        fractions["test"] = config.test_fraction
    members: dict[str, list[tuple[Candidate, Check]]] = {candidate.name: [] for candidate in candidates}
    for candidate, check in zip(candidates, checks, strict=True):
        if check.ok:
            members[candidate.name].append((candidate, check))
    classes = sorted(members)
    images = []
    for label, name in enumerate(classes):
        for c, check, split in _split(
            members[name], fractions, seed if config.split_seed is None else config.split_seed
        ):
            images.append(Image(c.path, label, split, check.size, check.digest))
    counts = Counter(image.label for image in images if image.split == "train")
    check_composition(classes, [counts[label] for label in range(len(classes))], config)
    salvaged = [Salvaged(candidates[index].path, text) for index, text in missing.items()]
    return Manifest(str(root.absolute()), tuple(classes), tuple(sorted(images)), tuple(refused), tuple(salvaged))


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
