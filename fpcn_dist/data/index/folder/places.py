"""Where the splits of a data folder lie. What is unclear is refused by name."""

from __future__ import annotations

from pathlib import Path

from fpcn_dist.data.index.folder.splits import find_splits, may_be_split, parse
from fpcn_dist.data.index.folder.tree import Tree
from fpcn_dist.data.index.notices import Notice
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import first_few, printable

_WITHOUT = {
    "val": "data.val_fraction of the training images then takes its place",
    "test": "what is measured is then measured on the validation images",
}
_ALL_CLASSES = "if it is a class, put the folders of all classes into train/<class>/"


def find_places(tree: Tree, root: Path | str, notices: list[Notice]) -> dict[str, str]:
    """The folder above the class folders of each split, train's first, with the split; none where there are no splits.

    Args:
        tree: the data folder.
        root: its name, for messages.
        notices: what is left out is added here.

    Raises:
        UserError: it is unclear whether a folder is a split; a split without train/, without images, or whose images
            have no classes.
    """
    tops = tree.children[""]
    groups = find_splits(tops)
    if len(groups) > 1:
        reason = " or ".join(_folders(group) for group in groups) + " may be its splits"
        raise UserError("--data", root, reason, "move all but those that are meant into a folder elsewhere")
    group = groups[0] if groups else {}
    beside = [top for top in tops if top not in group and tree.total[top]]
    if "train" not in group.values():
        _require_no_splits(tree, group, beside, root)
        return {}
    names: dict[str, list[str]] = {}
    for name, split in group.items():
        names.setdefault(split, []).append(name)
    for split, several in names.items():
        if len(several) > 1:
            reason = f"{_folders(several)} are names of one split, {split}"
            raise UserError("--data", root, reason, "keep one of them, or move the images of all into one")
    places = {}
    for split in ("train", "val", "test"):
        for top in names.get(split, ()):
            place = _inner(tree, top, split)
            if _is_labelled(tree, place, split, beside, root, notices):
                places[place] = split
    _look_beside(tree, group, beside, root, notices)
    return places


def describe(tree: Tree, folder: str) -> str:
    """A folder without images, and what it holds instead."""
    held = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in tree.suffixes(folder).most_common()]
    return printable(f"{folder}/ ({first_few(held) or 'empty'})")


def _inner(tree: Tree, top: str, split: str) -> str:
    """Archives often hold a split's folder in another of the same name: seg_train/seg_train/<class>/."""
    children = tree.children[top]
    if len(children) == 1 and not tree.images[top]:
        name = parse(children[0].rpartition("/")[2])
        if name is not None and name.split == split and (name.plain or children[0] == f"{top}/{top}"):
            return children[0]
    return top


def _is_labelled(
    tree: Tree, place: str, split: str, beside: list[str], root: Path | str, notices: list[Notice]
) -> bool:
    """Whether the images of a split lie in class folders; only those of the test split need not."""
    count = len(tree.images[place])
    if not tree.total[place]:
        hint = f"put images into {place}/<class>/"
        if split in _WITHOUT:
            hint += f", or remove the folder: {_WITHOUT[split]}"
        raise UserError("--data", root, f"{describe(tree, place)} holds no images", hint)
    if any(tree.total[folder] for folder in tree.children[place]):
        return True
    flat = f"{place}/ holds {count:,} image(s) and no class folders"
    if split == "test":
        text = f"left out: {count:,} image(s) without class folders; {_WITHOUT[split]}"
        notices.append(Notice(f"{place}/", text))
        return False
    if split == "val":
        hint = f"sort them into {place}/<class>/, or move the folder away: {_WITHOUT[split]}"
        raise UserError("--data", root, f"{flat}, so that their classes are not known", hint)
    hint = f"sort them into {place}/<class>/"
    if beside:
        flat += f"; beside {_folders(beside)} it may be a class of that name, or the training images"
        hint = f"{_ALL_CLASSES}; if not, {hint}"
    raise UserError("--data", root, flat, hint)


def _look_beside(tree: Tree, group: dict[str, str], beside: list[str], root: Path | str, notices: list[Notice]) -> None:
    """Refuse folders beside train/ that may be meant as splits or classes, and mention the others."""
    if unclear := [top for top in beside if may_be_split(top)]:
        reason = f"it is unclear whether {_folders(unclear)} beside {_folders(group)} are splits"
        raise UserError("--data", root, reason, "call them train/, val/ or test/, or move them away")
    full = [top for top in beside if tree.images[top]]
    if len(group) == 1 and len(full) > 1:
        (train,) = group
        reason = f"it is unclear whether {train}/ beside {_folders(full)} is the training split or a class"
        raise UserError("--data", root, reason, f"{_ALL_CLASSES}; if not, move the others away")
    for top in beside:
        text = f"left out: {tree.total[top]:,} image(s) beside {_folders(group)}, and no split"
        notices.append(Notice(f"{top}/", text))


def _require_no_splits(tree: Tree, group: dict[str, str], beside: list[str], root: Path | str) -> None:
    """Refuse a folder without train/ in which a folder is a split by its name, or may be one by what lies in it."""
    inside = {top: {child.rpartition("/")[2].lower() for child in tree.children[top]} for top in tree.children[""]}
    like_others = [
        top
        for top in beside
        if not tree.images[top] and any(inside[top] & inside[other] for other in inside if other != top)
    ]
    if unclear := [top for top in like_others if may_be_split(top)]:
        hint = "call them train/, val/ and test/, or move away what is not to be learnt"
        raise UserError("--data", root, f"it is unclear whether {_folders(unclear)} are splits or classes", hint)
    flat = [top for top in group if tree.images[top]]
    if flat and beside:
        reason = f"beside {_folders(beside)}, {_folders(flat)} may be a class, or images without classes"
        raise UserError("--data", root, reason, f"{_ALL_CLASSES}; if not, move it away")
    if group:
        raise UserError(
            "--data", root, f"it has {_folders(group)} but no train/", "put the training images into train/<class>/"
        )


def _folders(names: list[str] | dict[str, str]) -> str:
    return first_few(f"{name}/" for name in names)
