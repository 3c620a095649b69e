"""Rows of named columns, whatever file they come from: which column says what, and what a row says of its image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fpcn_dist.data.index.shapes.found import split_called
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.runtime.errors import UserError, nearest
from fpcn_dist.runtime.names import first_few

_USUAL = {"image": ("path", "file_name"), "label": ("label",), "split": ("split",), "group": ("group",)}
_OPTIONAL = ("split", "group")


def choose(file: Path, header: Sequence[str], columns: ColumnsConfig, *wanted: str) -> dict[str, str]:
    """The column of a file for each of ``image``, ``label``, ``split`` and ``group`` that is wanted and there.

    Raises:
        UserError: a column that the recipe names or that every data set needs is missing.
    """
    chosen = {}
    for use in wanted:
        named = getattr(columns, use)
        if named is not None and named not in header:
            reason = f"{file} has no such column"
            raise UserError(f"data.columns.{use}", named, reason, nearest(named, header) if header else "mend the file")
        column = named or next((name for name in _USUAL[use] if name in header), None)
        if column is not None:
            chosen[use] = column
        elif use not in _OPTIONAL:
            reason = f"it has no column {' or '.join(_USUAL[use])}; its columns are {first_few(header) or 'none'}"
            raise UserError("--data", file, reason, f"name the column in data.columns.{use}")
    return chosen


def text(value: Any) -> str:
    """A cell as text, without the spaces around it; empty where there is nothing in it.

    What no file can be called, a zero byte or half a character of UTF-16 that JSON lets through, is written as an
    escape.
    """
    word = "" if value is None else str(value).strip().replace("\0", "\\0")
    return word if word.isascii() else word.encode("utf-8", "backslashreplace").decode("utf-8")


class Said(NamedTuple):
    """What a row says of its image; ``label`` is empty where it says none."""

    label: str
    split: str | None
    group: str | None


def read_row(file: Path, where: str, row: Mapping[str, Any], chosen: Mapping[str, str]) -> Said:
    """Label, split and group of a row.

    Raises:
        UserError: its split is missing or has an unknown name, or its label is no word or number.
    """
    label, split, group = (row.get(chosen[use]) if use in chosen else None for use in ("label", "split", "group"))
    if isinstance(label, (list, dict)):
        reason = f"{where} has a label that is neither a word nor a number ({label!r})"
        raise UserError("--data", file, reason, "give each image one class")
    known = split_called(text(split))
    if "split" in chosen and known is None:
        found = f"has the split {text(split)!r}" if text(split) else "has no split"
        hint = f"use train, val and test in column {chosen['split']} of every row, or leave the column out"
        raise UserError("--data", file, f"{where} {found}", hint)
    return Said(text(label), known, text(group) or None)
