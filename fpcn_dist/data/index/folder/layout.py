"""Which files of a data folder belong to which class and which split, what is left out, and why.

Two forms of folder are read, in both of which a class is a folder of images, which may lie in folders of their own
below it; names that start with a dot are ignored:

- ``DIR/<class>/...``: every class is split with ``val_fraction`` and ``test_fraction``;
- ``DIR/train/<class>/...``, where ``DIR/val/`` and ``DIR/test/`` may lie beside it, under any of the names of
  :mod:`fpcn_dist.data.index.folder.splits`. Without a validation folder, ``val_fraction`` of the training images become
  the validation images. Without a test folder there is no test split: what is measured is then measured on the
  validation images.

What a folder holds is listed first (:mod:`fpcn_dist.data.index.folder.folders`); the rest follows from the list alone.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from fpcn_dist.data.blob import Blob, Stored
from fpcn_dist.data.index.check.images import Refused
from fpcn_dist.data.index.folder.folders import SUFFIXES, Listing, is_image, list_folder
from fpcn_dist.data.index.folder.places import describe, find_places
from fpcn_dist.data.index.folder.strangers import ancestors, find_strangers, is_inside
from fpcn_dist.data.index.folder.tree import Tree
from fpcn_dist.data.index.notices import Notice
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import first_few, printable

_FORM = "give a folder with one sub-folder of images for each class"


class Candidate(NamedTuple):
    """An image as found, before anything is read of it.

    Attributes:
        path: relative to the data folder, or what it is called in what holds it.
        name: its class.
        split: ``train``, ``val`` or ``test``, where the data say.
        group: images of one group never lie on both sides of a split.
        place: where its bytes lie, in a file relative to the data folder; ``None`` where it is a file of its own.
    """

    path: str
    name: str
    split: str | None
    group: str | None = None
    place: Blob | None = None


class Found(NamedTuple):
    """What a data set holds, before any image is read.

    Attributes:
        candidates: what should be images.
        notices: what a user should know about the others.
        refused: images that cannot be used, as is known already.
        stored: what a remote folder lists of its objects, by their path.
    """

    candidates: list[Candidate]
    notices: Sequence[Notice] = ()
    refused: Sequence[Refused] = ()
    stored: Mapping[str, Stored] = MappingProxyType({})


def find(root: Path) -> Found:
    """All image files of a data folder.

    Raises:
        UserError: the folder is no data folder, or it is unclear what is meant; names the folders that are.
    """
    if not root.exists():
        raise UserError("--data", root, "there is no such folder", _FORM)
    if not root.is_dir():
        raise UserError("--data", root, "it is not a folder", _FORM)
    return arrange(list_folder(root), root)


def arrange(listing: Listing, root: Path | str) -> Found:
    """Decide what each of the listed files is. No file is touched.

    Args:
        listing: what lies below the data folder.
        root: the data folder, for messages.

    Raises:
        UserError: see :func:`find`.
    """
    strangers = find_strangers(listing.folders, is_image)
    _require_readable(listing, strangers, root)
    tree = Tree(listing, strangers)
    notices = _left_out(strangers)
    places: dict[str, str | None] = {**find_places(tree, root, notices)} or {"": None}
    members = {place: _by_class(tree, place) for place in places}
    _require_each_folder_once(listing, strangers, members, root, notices)
    _check_classes(tree, members, root, notices)
    spelling = _spell(members, notices)
    candidates = [
        Candidate(path, spelling[key], places[place])
        for place, classes in members.items()
        for key, folders in classes.items()
        for folder in folders
        for path in tree.paths(folder)
    ]
    return Found(sorted(candidates), notices + _describe_others(tree, members))


def _left_out(folders: Mapping[str, str]) -> list[Notice]:
    """A sentence for each reason to leave folders out."""
    by_reason: dict[str, list[str]] = {}
    for folder, reason in sorted(folders.items()):
        by_reason.setdefault(reason, []).append(f"{folder}/")
    return [Notice(first_few(names), f"left out: {reason}") for reason, names in by_reason.items()]


def _require_readable(listing: Listing, strangers: Collection[str], root: Path | str) -> None:
    unreadable = [
        f"{path}/ ({reason})" if path else f"the folder itself ({reason})"
        for path, reason in sorted(listing.unreadable.items())
        if not is_inside(path, strangers)
    ]
    if unreadable:
        hint = "change the permissions, mend the links, or move them away"
        raise UserError("--data", root, f"it cannot be read whole: {first_few(unreadable)}", hint)


def _by_class(tree: Tree, place: str) -> dict[str, list[str]]:
    """The class folders of a split (or of all), by a key that is the same for all spellings of a name in Unicode."""
    classes: dict[str, list[str]] = {}
    for folder in tree.children[place]:
        if tree.total[folder]:
            classes.setdefault(unicodedata.normalize("NFC", _name(folder)), []).append(folder)
    return classes


def _require_each_folder_once(
    listing: Listing,
    strangers: Collection[str],
    members: Mapping[str, dict[str, list[str]]],
    root: Path | str,
    notices: list[Notice],
) -> None:
    """Refuse links that put one folder into two classes or two splits, and mention those that lead nowhere new."""
    homes = {folder: (place, key) for place, classes in members.items() for key in classes for folder in classes[key]}

    def home(path: str) -> tuple[str, str] | None:
        return next((homes[above] for above in ancestors(path) if above in homes), None)

    known: dict[str, str] = {}
    for link, target in sorted(listing.same.items()):
        if is_inside(link, strangers) or (target and is_inside(target, strangers)):
            continue
        if not target or is_inside(link, {target}):
            known[link] = "a link to a folder above it"
        elif home(link) is not None and home(link) == home(target):
            known[link] = f"the same folder as {target}/, which is used already"
        else:
            both = " and ".join(printable(f"{folder}/") for folder in (target, link))
            reason = f"{both} are the same folder, and an image cannot be of two classes or two splits"
            raise UserError("--data", root, reason, "remove one of the links to it")
    notices += _left_out(known)


def _check_classes(
    tree: Tree, members: Mapping[str, dict[str, list[str]]], root: Path | str, notices: list[Notice]
) -> None:
    """Refuse folders without at least two classes, without images of a class, or with classes that train lacks."""
    (first, classes), *others = members.items()
    if not classes:
        where = f"{root}/{first}".rstrip("/")
        reason = f"no sub-folder of {where} holds images ({' '.join(sorted(SUFFIXES))})"
        if tree.images[first]:
            reason += f"; {len(tree.images[first]):,} lie in {where} itself"
        raise UserError("--data", root, reason, _FORM)
    if empty := [describe(tree, folder) for folder in tree.children[first] if not tree.total[folder]]:
        reason = f"class folder(s) without a single image: {first_few(empty)}"
        raise UserError("--data", root, reason, "put images into them, or move away what is no class")
    if len(classes) == 1:
        (name,), ((folder, *_),) = classes, classes.values()
        hint = "add a folder of images of another class"
        if not tree.images[folder] and len(tree.children[folder]) > 1:
            hint += f", or give {root}/{folder} if its sub-folders are the classes"
        raise UserError("--data", root, f"it holds one class only ({name!r}), and there is nothing to tell apart", hint)
    for place, found in others:
        extra, missing = sorted(found.keys() - classes.keys()), sorted(classes.keys() - found.keys())
        if extra:
            reason = f"{place}/ has classes that {first}/ lacks: {first_few(map(repr, extra))}"
            if missing:
                reason += f"; of those of {first}/ it lacks {first_few(map(repr, missing))}"
            raise UserError("--data", root, reason, f"give them the names of {first}/, or training images")
        if missing:
            text = f"has no images of {len(missing):,} class(es) of {first}/: {first_few(map(repr, missing))}"
            notices.append(Notice(f"{place}/", text))
    _mention_same_sub_folders(tree, classes, notices)


def _mention_same_sub_folders(tree: Tree, classes: Mapping[str, list[str]], notices: list[Notice]) -> None:
    """Say that all classes have the same sub-folders, which may be the real classes."""
    inside = [
        frozenset(_name(child) for child in tree.children[folder] if tree.total[child])
        for folders in classes.values()
        for folder in folders
    ]
    direct = any(tree.images[folder] for folders in classes.values() for folder in folders)
    if not direct and len(inside[0]) > 1 and len(set(inside)) == 1:
        text = f"lie in every class ({first_few(classes)}), and are learnt as parts of it, not as classes"
        notices.append(Notice(f"sub-folders {first_few(sorted(inside[0]))}", text))


def _spell(members: Mapping[str, dict[str, list[str]]], notices: list[Notice]) -> dict[str, str]:
    """The name of each class: as the training images have it, where folders spell it in different ways."""
    spelling: dict[str, str] = {}
    for key in dict.fromkeys(key for classes in members.values() for key in classes):
        names = dict.fromkeys(_name(f) for classes in members.values() for f in classes.get(key, ()))
        spelling[key] = next(iter(names))
        if len(names) > 1:
            ways = " and ".join(map(ascii, names))
            text = f"one class: its name is written in {len(names)} ways of Unicode ({ways})"
            notices.append(Notice(spelling[key], text))
    return spelling


def _describe_others(tree: Tree, members: Mapping[str, dict[str, list[str]]]) -> list[Notice]:
    """What lies among the images and is not read: loose images, hidden ones, and other files by their suffix."""
    notices = []
    for place in dict.fromkeys(("", *members)):
        if loose := len(tree.images[place]):
            where = f"{place}/" if place else "the data folder itself"
            notices.append(Notice(where, f"left out: {loose:,} image(s) that lie in no class folder"))
    counts: dict[str, Counter[str]] = {}
    hidden: list[str] = []
    for folder in (f for classes in members.values() for folders in classes.values() for f in folders):
        hidden += tree.hidden(folder)
        for suffix, count in tree.suffixes(folder).items():
            counts.setdefault(suffix, Counter())[folder] = count
    if hidden:
        notices.append(Notice("hidden files", f"left out: {len(hidden):,}, such as {printable(hidden[0])}"))
    for suffix, by_folder in sorted(counts.items()):
        where = first_few(f"{folder}/ ({count:,})" for folder, count in by_folder.most_common())
        text = f"left out: {by_folder.total():,} file(s) with the suffix of no image, in {where}"
        notices.append(Notice(suffix or "no suffix", text))
    return notices


def _name(folder: str) -> str:
    return folder.rpartition("/")[2]
