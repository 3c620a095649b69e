"""Which folders of a data folder are its splits, told by their names and by what lies in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

_WORDS = {
    **dict.fromkeys(("train", "training", "trainset", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "valset", "dev", "devset", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "tst"), "test"),
}
_FILLERS = {
    "set",
    "split",
    "data",
    "dataset",
    "folder",
    "image",
    "images",
    "img",
    "imgs",
    "photos",
    "pictures",
    "samples",
}
"""Words that leave a name's meaning as it is: train_set/ is train/."""
_UNCLEAR = {"holdout", "heldout", "trainval", "traintest", "trainvaltest"}
_BOUNDARY = re.compile(r"[\s_.-]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])")
_SIMILAR = 0.8
"""From this similarity on (difflib's ratio), a word may be a misspelt one."""


class SplitName(NamedTuple):
    """A folder name that holds the word for one split.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        rest: the other words, in lower case, with "*" where the word for the split stands.
    """

    split: str
    rest: tuple[str, ...]

    @property
    def plain(self) -> bool:
        return self.rest == ("*",)


def parse(name: str) -> SplitName | None:
    """What a folder name such as ``Train`` or ``seg_train`` says about its split; ``None`` where it says nothing."""
    words = [word.lower() for word in _BOUNDARY.split(name) if word]
    found = [_WORDS[word] for word in words if word in _WORDS]
    if len(found) != 1:
        return None
    return SplitName(found[0], tuple("*" if word in _WORDS else word for word in words if word not in _FILLERS))


def find_splits(names: Iterable[str]) -> list[dict[str, str]]:
    """The folders that may be the splits of one data set, as split by name.

    Names without further words are splits whatever stands beside them; with further words, as in seg_train/ and
    seg_test/, only where another split has the same ones.

    Returns:
        What the names may mean, the likeliest alone where there is one; empty where no folder is named like a split.
    """
    parsed = {name: found for name in names if (found := parse(name))}
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name, (split, rest) in parsed.items():
        groups.setdefault(rest, {})[name] = split
    plain = groups.pop(("*",), {})
    if "train" in plain.values():
        return [plain]
    others = [group for group in groups.values() if "train" in group.values() and len(set(group.values())) > 1]
    return others or ([plain] if plain else [])


def may_be_split(name: str) -> bool:
    """Whether a name that is no split's for certain may be meant as one: val2/, trian/, holdout/."""
    words = [word.lower() for word in _BOUNDARY.split(name) if word]
    return any(word in _WORDS or word in _UNCLEAR or _is_misspelt(word) for word in words) or "".join(words) in _UNCLEAR


def _is_misspelt(word: str) -> bool:
    known = [split for split in _WORDS if len(split) > 3 and split[0] == word[0]]
    return bool(difflib.get_close_matches(word, known, n=1, cutoff=_SIMILAR))
