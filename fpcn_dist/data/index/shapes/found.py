"""What a data set of another shape than a folder holds, and whether its classes, splits and groups fit together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fpcn_dist.data.index.folder.layout import Candidate, Found
from fpcn_dist.data.index.folder.splits import parse
from fpcn_dist.data.index.notices import Notice
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import first_few, printable


def split_called(name: str) -> str | None:
    """``train``, ``val`` or ``test``, where a word is a usual name of it, in any case."""
    found = parse(name.strip())
    return found.split if found is not None and found.plain else None


def splits_of_files(data: Path, files: Sequence[Path]) -> dict[Path, str | None]:
    """The split that the name of each file says (``train-00000.tar``), or the folder that it lies in (``val/0.tar``).

    Raises:
        UserError: only some say so.
    """
    found: dict[Path, str | None] = {}
    for file in files:
        relative = file.relative_to(data)
        said = (parse(name) for name in (relative.stem, *reversed(relative.parts[:-1])))
        found[file] = next((name.split for name in said if name is not None), None)
    unclear = [str(file.relative_to(data)) for file, split in found.items() if split is None]
    if 0 < len(unclear) < len(files):
        reason = f"{len(unclear)} of its {len(files)} files belong to no split ({first_few(unclear)}), while others do"
        raise UserError("--data", data, reason, "begin each name with train, val or test, or none")
    return found


def checked(data: Path, found: Found) -> Found:
    """What was found, if it can be learnt from.

    Raises:
        UserError: no images, one class only, no training images, a class that has none, or a group on both sides of a
            split.
    """
    candidates = found.candidates
    if not candidates:
        said = f"none of its {len(found.refused)} images can be used" if found.refused else "it holds no images"
        first = "".join(f" ({printable(path)}: {reason})" for path, reason in found.refused[:1])
        raise UserError("--data", data, said + first, "see docs/data.md for the forms of data sets")
    classes = {candidate.name for candidate in candidates}
    if len(classes) == 1:
        reason = f"it holds one class only ({min(classes)!r}), and there is nothing to tell apart"
        raise UserError("--data", data, reason, "add images of another class")
    _check_groups(data, candidates)
    if any(candidate.split is None for candidate in candidates):
        return found
    return found._replace(notices=[*found.notices, *_check_splits(data, candidates)])


def _check_splits(data: Path, candidates: Sequence[Candidate]) -> Iterator[Notice]:
    """What a user should know about the classes of the splits."""
    trained = {candidate.name for candidate in candidates if candidate.split == "train"}
    if not trained:
        held = ", ".join(sorted({candidate.split or "" for candidate in candidates}))
        raise UserError("--data", data, f"it has images to {held}, but none to train", "add training images")
    extra = sorted({candidate.name for candidate in candidates} - trained)
    if extra:
        reason = f"{len(extra)} class(es) have no training images ({first_few(extra)})"
        raise UserError("--data", data, reason, "give each class training images, or leave it out of every split")
    for split in ("val", "test"):
        held = {candidate.name for candidate in candidates if candidate.split == split}
        if held and held < trained:
            missing = sorted(trained - held)
            yield Notice(f"split {split}", f"has no images of {len(missing):,} class(es): {first_few(missing)}")


def _check_groups(data: Path, candidates: Sequence[Candidate]) -> None:
    split_of: dict[str, str | None] = {}
    for candidate in candidates:
        if candidate.group is not None:
            before = split_of.setdefault(candidate.group, candidate.split)
            if before != candidate.split:
                reason = f"group {candidate.group!r} has images in {before} and in {candidate.split}"
                raise UserError("--data", data, reason, "put each group into one split")
