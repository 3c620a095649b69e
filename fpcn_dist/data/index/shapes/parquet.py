"""Data sets in Parquet files, as Hugging Face has them: a column of images (structs of bytes and path), and a label.

Where each image lies is found out once, and remembered; an image is then read with the page that holds it (about a
megabyte), or alone where the file is not compressed, in any order.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fpcn_dist.data.blob import Blob, Packed
from fpcn_dist.data.index.check.images import Refused
from fpcn_dist.data.index.folder.layout import Candidate, Found
from fpcn_dist.data.index.shapes import columns as cells
from fpcn_dist.data.index.shapes.found import splits_of_files
from fpcn_dist.data.index.shapes.remembered import remembered
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.runtime.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


class _Row(NamedTuple):
    """A row as it is remembered: the image's own path, where its bytes are (offset, size, packed), and its cells."""

    path: str | None
    place: list[Any] | None
    cells: dict[str, Any]


def find(data: Path, root: Path, files: Sequence[Path], columns: ColumnsConfig) -> Found:
    """The images of Parquet files.

    Args:
        data: what ``--data`` names.
        root: what the paths of files are made relative to.
        files: in their order.
        columns: the recipe's ``data.columns``.

    Raises:
        UserError: pyarrow is not installed; a file is damaged, lacks a column, or has images in an encoding that cannot
            be read one by one.
    """
    if importlib.util.find_spec("pyarrow") is None:
        reason = "Parquet files need pyarrow, which is not installed"
        raise UserError("--data", data, reason, "pip install 'fpcn-dist[parquet]'")
    splits = splits_of_files(root, files)
    found: list[tuple[str, Candidate]] = []
    refused: list[Refused] = []
    for file in files:
        place = file.relative_to(root).as_posix()
        chosen, names, rows = _open(file, columns)
        for number, row in enumerate(rows):
            where = f"row {number}"
            said = cells.read_row(file, where, row.cells, chosen)
            label, path = _label(file, where, said.label, names), cells.text(row.path)
            if row.place is None or not label:
                reason = f"{where} of {place} has no label"
                if row.place is None:
                    reason = f"{where} of {place} holds no bytes" + (f", and names the file {path}" if path else "")
                refused.append(Refused(path or f"{place}, {where}", reason))
                continue
            *piece, packed = row.place
            blob = Blob(place, *piece, packed=packed and Packed(*packed))
            split = said.split or splits[file]
            found.append(
                (f"{place.removesuffix('.parquet')}/{number:06d}", Candidate(path, label, split, said.group, blob))
            )
    return Found(_named(found), refused=refused)


def _named(found: Sequence[tuple[str, Candidate]]) -> list[Candidate]:
    """The candidates, called as in a folder: split, class, own file name; or by their row, where several share that."""
    called = []
    for _, c in found:
        path = c.path.strip("/")
        inside = path if "/" in path else f"{c.name}/{path}"
        called.append(f"{c.split}/{inside}" if c.split else inside)
    count = Counter(called)
    return [
        c._replace(path=name if c.path and count[name] == 1 else row)
        for name, (row, c) in zip(called, found, strict=True)
    ]


def _label(file: Path, where: str, label: str, names: Sequence[str] | None) -> str:
    """The name of a class; empty where there is none."""
    if names is None or label in ("", "-1"):
        return label if names is None else ""
    if not label.isdecimal() or int(label) >= len(names):
        reason = f"{where} has the label {label}, and the file names {len(names)} classes"
        raise UserError("--data", file, reason, "write the file anew")
    return names[int(label)]


def _open(file: Path, columns: ColumnsConfig) -> tuple[dict[str, str], list[str] | None, Iterator[_Row]]:
    """The columns of a file by their use, the names of its classes where it has them, and its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            image = _image_column(file, schema, columns)
            chosen = cells.choose(file, schema.names, columns, "label", "split", "group")
        kind = f"parquet 1 {image} {json.dumps(chosen)}"
        rows = remembered(file, kind, lambda file: list(_read_rows(file, image, chosen)))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = f"its images cannot be read ({' '.join(str(error).split())[:200]})"
        raise UserError("--data", file, reason, "fetch the file anew, or write it anew with pyarrow") from None
    return chosen, _class_names(schema, chosen["label"]), (_Row(*row) for row in rows)


def _image_column(file: Path, schema: pa.Schema, columns: ColumnsConfig) -> str:
    """The column of bytes, as Parquet calls it: ``image.bytes`` where it belongs to a struct.

    Raises:
        UserError: there is none, or there are several and the recipe names none.
    """
    import pyarrow as pa

    def is_binary(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = {}
    for field in schema:
        if pa.types.is_struct(field.type):
            if any(inner.name == "bytes" and is_binary(inner.type) for inner in field.type):
                found[field.name] = f"{field.name}.bytes"
        elif is_binary(field.type):
            found[field.name] = field.name
    if columns.image is not None:
        if columns.image not in found:
            reason = f"{file} has no such column of images (its columns are {', '.join(schema.names)})"
            raise UserError("data.columns.image", columns.image, reason, "name a column of structs with bytes and path")
        return found[columns.image]
    if len(found) != 1:
        named = f"{len(found)} columns of images ({', '.join(found)})" if found else "no column of images"
        hint = "name one in data.columns.image" if found else "store images as structs of bytes and path"
        raise UserError("--data", file, f"it has {named}; its columns are {', '.join(schema.names)}", hint)
    return next(iter(found.values()))


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """The names of classes that Hugging Face's schema has for a column of integers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [cells.text(name) for name in names]


def _read_rows(file: Path, image: str, chosen: dict[str, str]) -> Iterator[_Row]:
    """Where the image of each row lies, and what its other cells say.

    Raises:
        pyarrow.ArrowException, OSError, ValueError: the file is damaged, or its images cannot be read one by one.
    """
    import pyarrow.parquet as pq

    column = image.removesuffix(".bytes")
    with pq.ParquetFile(file) as opened:
        for group in range(opened.num_row_groups):
            wanted = [column, *chosen.values()] if column == image else [image, f"{column}.path", *chosen.values()]
            table = opened.read_row_group(group, columns=wanted, use_threads=False)
            images = table.column(column)
            if column == image:
                values, paths = images, [None] * len(images)
            else:
                values = _of_structs(images, "bytes")
                paths = _of_structs(images, "path") if images.type.get_field_index("path") >= 0 else None
                paths = paths.to_pylist() if paths is not None else [None] * len(images)
            others = table.select(list(dict.fromkeys(chosen.values()))).to_pylist()
            located = _locate(file, opened.metadata.row_group(group), image, values)
            for path, place, row in zip(paths, located, others, strict=True):
                yield _Row(path, place and list(place), {name: _plain(cell) for name, cell in row.items()})


def _plain(cell: Any) -> Any:
    """A cell as JSON has it."""
    if isinstance(cell, (list, dict)):
        return list(map(str, cell))
    return cell if isinstance(cell, int) or cell is None else str(cell)


def _of_structs(images: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A field of a column of structs, null where the struct is."""
    import pyarrow.compute as pc

    return pc.struct_field(images, name)  # pyright: ignore[reportAttributeAccessIssue]


def _locate(file: Path, group: pq.RowGroupMetaData, image: str, values: pa.ChunkedArray) -> Iterator[Any]:
    from fpcn_dist.data.index.shapes.pages import places

    chunks = [group.column(index) for index in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == image)
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    data = Blob(str(file), start, chunk.total_compressed_size).read()
    return places(data, start, chunk.compression, (value.as_py() for value in values))
