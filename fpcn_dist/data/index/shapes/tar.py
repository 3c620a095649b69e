"""Data sets in tar shards, as WebDataset writes them: files that share a name up to its first dot are one example.

Headers are read once, and remembered; the images are read where they lie in the shards, in any order.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.folders import SUFFIXES
from fpcn_dist.data.index.images import Refused
from fpcn_dist.data.index.layout import Candidate, Found
from fpcn_dist.data.index.shapes import columns as cells
from fpcn_dist.data.index.shapes.found import splits_of_files
from fpcn_dist.data.index.shapes.remembered import remembered
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.runtime.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
_LABELS = ("cls", "json", "txt")
"""Where the label of an example may stand, the first that it has."""
_MOST_TEXT = 1 << 20
"""Bytes of a label's file at most."""


class Member(NamedTuple):
    """A file in a shard: its name, where its bytes begin and how many they are, and what they say of a label."""

    name: str
    offset: int
    size: int
    text: str | None


def expand(pattern: str) -> list[str]:
    """The paths that a pattern such as ``shard-{000..012}.tar`` or ``{a,b}.tar`` stands for, in their order."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    words = match[1].split(",")
    if numbers:
        first, last = numbers.groups()
        words = [str(n).zfill(len(first) if first[0] == "0" else 0) for n in range(int(first), int(last) + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for word in words for path in expand(head + word + tail)]


def find(data: Path, root: Path, shards: Sequence[Path], columns: ColumnsConfig) -> Found:
    """The images of shards.

    Args:
        data: what ``--data`` names.
        root: what the paths of shards are made relative to.
        shards: in their order.
        columns: the recipe's ``data.columns``, for labels in ``.json`` files.

    Raises:
        UserError: a shard is missing, damaged or cut short, or a label cannot be read.
    """
    splits = splits_of_files(root, shards)
    found: list[tuple[Path, Candidate]] = []
    refused: list[Refused] = []
    for shard in shards:
        place = shard.relative_to(root).as_posix()
        for members in _examples(_index(shard)):
            images = [member for member in members.values() if _is_image(member.name)]
            if not images:
                continue
            said = _label(shard, members, columns)
            reason = None
            if len(images) > 1:
                reason = f"the example has {len(images)} images ({', '.join(image.name for image in images)})"
            elif not said.label:
                reason = f"{shard.name} has no label beside it ({', '.join('.' + ending for ending in _LABELS)})"
            if reason is not None:
                refused.append(Refused(images[0].name, reason))
                continue
            split = splits[shard]
            path = f"{split}/{images[0].name}" if split else images[0].name
            where = Blob(place, images[0].offset, images[0].size)
            found.append((shard, Candidate(path, said.label, split, said.group, where)))
    return Found(_unique(root, found), refused=refused)


def _unique(root: Path, found: Sequence[tuple[Path, Candidate]]) -> list[Candidate]:
    """The candidates; names that several shards have begin with the shard's."""
    count = Counter(candidate.path for _, candidate in found)
    return [
        c if count[c.path] == 1 else c._replace(path=f"{shard.relative_to(root).with_suffix('').as_posix()}/{c.path}")
        for shard, c in found
    ]


def _examples(members: Sequence[Member]) -> Iterator[dict[str, Member]]:
    """The files of each example by what follows the first dot of their name, in lower case."""
    examples: dict[str, dict[str, Member]] = defaultdict(dict)
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        key, dot, ending = base.partition(".")
        if key and dot and not base.startswith("."):
            examples[folder + slash + key][ending.lower()] = member
    return iter(examples.values())


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _label(shard: Path, members: dict[str, Member], columns: ColumnsConfig) -> cells.Said:
    ending = next((ending for ending in _LABELS if ending in members), None)
    if ending is None:
        return cells.Said("", None, None)
    member = members[ending]
    if member.text is None:
        reason = f"{member.name} is no label: it is not UTF-8, or larger than a megabyte"
        raise UserError("--data", shard, reason, "write labels as text")
    if ending != "json":
        return cells.Said(cells.text(member.text), None, None)
    try:
        values = json.loads(member.text)
    except ValueError as error:
        raise UserError("--data", shard, f"{member.name} is no JSON ({error})", "write the shard anew") from None
    if not isinstance(values, dict):
        values = {columns.label or "label": values}
    chosen = {"label": columns.label or "label", "group": columns.group or "group"}
    return cells.read_row(shard, member.name, values, chosen)


def _index(shard: Path) -> list[Member]:
    try:
        return [Member(*values) for values in remembered(shard, "tar 1", _read_headers)]
    except OSError as error:
        raise UserError("--data", shard, f"cannot be read ({error.strerror or error})", "check the shard") from None


def _read_headers(shard: Path) -> list[Member]:
    """The files of a shard.

    Raises:
        UserError: it is no tar file, or is cut short.
        OSError: it cannot be read.
    """
    members: list[Member] = []
    end = shard.stat().st_size
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:", errorlevel=1) as tar:
            for member in tar:
                # These would hold every header of a large shard.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                text = None
                if member.name.lower().rpartition(".")[2] in _LABELS and member.size <= _MOST_TEXT:
                    text = _text(file, member)
                members.append(Member(cells.text(member.name), member.offset_data, member.size, text))
            file.seek(tar.offset)
            closed = end == 0 or not any(file.read(tarfile.BLOCKSIZE) or b"cut")
    except (tarfile.TarError, EOFError, ValueError) as error:
        reason = f"it is no tar file, or damaged after {len(members)} files ({error})"
        raise UserError("--data", shard, reason, "fetch or write the shard anew") from None
    if not closed:
        reason = f"it is cut short: after {len(members)} files, the mark of a tar file's end is missing"
        raise UserError("--data", shard, reason, "fetch or write the shard anew")
    return members


def _text(file: Any, member: tarfile.TarInfo) -> str | None:
    before = file.tell()
    file.seek(member.offset_data)
    data = file.read(member.size)
    file.seek(before)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
