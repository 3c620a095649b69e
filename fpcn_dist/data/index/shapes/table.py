"""Data sets whose images are files that a table names: CSV, TSV or JSON lines, one image a row.

Paths are relative to the table. Hugging Face's ``metadata.csv`` or ``metadata.jsonl`` lies in the data folder, or in
each of its splits (``train/metadata.csv``).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.images import Refused
from fpcn_dist.data.index.layout import Candidate, Found
from fpcn_dist.data.index.shapes import columns as cells
from fpcn_dist.data.index.shapes.found import split_called
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.runtime.errors import UserError

SUFFIXES = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSON lines", ".ndjson": "JSON lines"}
METADATA = ("metadata.csv", "metadata.jsonl")
_DELIMITERS = ",;\t|"

Row = tuple[int, dict[str, Any]]
"""The number of a line, from 1, and what it says by column."""


def find_metadata(folder: Path) -> list[Path]:
    """Hugging Face's tables of a data folder: its own, or those of its splits."""
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and split_called(path.name))]
    return [place / name for place in places for name in METADATA if (place / name).is_file()]


def names_classes(file: Path, columns: ColumnsConfig) -> bool:
    """Whether a table names images and their classes; else their folders may."""
    try:
        header, _ = _read(file)
        return len(cells.choose(file, header, columns, "image", "label")) == 2
    except UserError:
        return False


def find(files: list[Path], root: Path, columns: ColumnsConfig) -> Found:
    """The images that tables name.

    Args:
        files: tables; where there are several, the folder of each is a split.
        root: what the paths of images are made relative to.
        columns: the recipe's ``data.columns``.

    Raises:
        UserError: a table cannot be read, lacks a column, or says two things of one image.
    """
    candidates: dict[str, Candidate] = {}
    lines: dict[str, str] = {}
    refused: list[Refused] = []
    for file in files:
        header, rows = _read(file)
        chosen = cells.choose(file, header, columns, "image", "label", "split", "group")
        folder_split = split_called(file.parent.name) if file.parent != root else None
        for number, row in rows:
            where, name = f"line {number}", cells.text(row.get(chosen["image"]))
            said = cells.read_row(file, where, row, chosen)
            path = _relative(root, file.parent, name)
            missing = "no path" if not name else "no label" if not said.label else None
            if missing or path is None:
                reason = f"{where} of {file.name} has {missing}" if missing else f"lies outside of {root}"
                refused.append(Refused(name or f"{file.name}, {where}", reason))
                continue
            candidate = Candidate(path, said.label, said.split or folder_split, said.group)
            before = candidates.setdefault(path, candidate)
            if before != candidate:
                reason = f"{where} says something else of {path} than {lines[path]} does"
                raise UserError("--data", file, reason, "name each image once")
            if lines.setdefault(path, where) != where:
                refused.append(Refused(path, f"{where} of {file.name} repeats {lines[path]}; it is used once"))
    return Found(list(candidates.values()), refused=refused)


def _relative(root: Path, folder: Path, name: str) -> str | None:
    """A path below ``root`` with forward slashes; ``None`` where it leads out of it."""
    for top, place in ((root, folder), (root.resolve(), folder)):
        path = os.path.relpath(os.path.normpath(place / name), top)
        if path.split(os.sep)[0] != os.pardir:
            return path.replace(os.sep, "/")
    return None


def _read(file: Path) -> tuple[list[str], Iterator[Row]]:
    """The columns and the rows of a table.

    Raises:
        UserError: it cannot be read; at once, or on the way.
    """
    try:
        content = Blob(str(file)).read().decode("utf-8-sig")
    except OSError as error:
        raise UserError("--data", file, f"cannot be read ({error.strerror})", "check the file") from None
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 (byte {error.start})"
        raise UserError("--data", file, reason, "save it as UTF-8") from None
    if SUFFIXES[file.suffix.lower()] == "JSON lines":
        found = list(_json_rows(file, content))
        header = list({name: None for _, row in found for name in row})
        return header, iter(found)
    first = content.partition("\n")[0]
    tabs = file.suffix.lower() == ".tsv"
    delimiter = "\t" if tabs else max(_DELIMITERS, key=first.count)
    lines = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    rows = _csv_rows(file, lines)
    header = next(rows, (0, []))[1]
    names = [name.strip() for name in header]
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise UserError("--data", file, f"column {min(twice)} is there twice", "rename one of the columns")
    return names, _by_column(file, names, rows)


def _csv_rows(file: Path, lines: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, with the number of the line that they end in."""
    try:
        for row in lines:
            if any(row):
                yield lines.line_num, row
    except csv.Error as error:
        reason = f"line {lines.line_num} is no line of a table ({error})"
        raise UserError("--data", file, reason, "mend the quotes around its cells") from None


def _by_column(file: Path, names: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    for number, row in rows:
        if len(row) != len(names):
            reason = f"line {number} has {len(row)} cells, and the first line {len(names)} columns"
            raise UserError("--data", file, reason, 'write each cell that holds a delimiter as "..."')
        yield number, dict(zip(names, row, strict=True))


def _json_rows(file: Path, content: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            row = str(error)
        if not isinstance(row, dict):
            reason = f"line {number} is no JSON object" + (f" ({row})" if isinstance(row, str) else "")
            raise UserError("--data", file, reason, 'write each image as {"path": ..., "label": ...}')
        yield number, row
