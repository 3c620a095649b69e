"""Tables of images: what is read of them, what is refused image by image, and what ends in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.shapes.recognise import recognise
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError
from tests.helpers.shapes import photographs, write_table

CONFIG = DataConfig(images_per_class=1, classes_per_batch=None)


@pytest.fixture
def folder(rocks: Path, tmp_path: Path) -> Path:
    """Four photographs of each class."""
    for path, _ in photographs(rocks):
        if path[-5] in "0123" and path[-6] == "0":
            (tmp_path / path).parent.mkdir(exist_ok=True)
            shutil.copy(rocks / path, tmp_path / path)
    return tmp_path


def _build(file: Path, **changes: object) -> Manifest:
    return build_manifest(file, CONFIG.changed(**changes), 0)


def _named(data: Path, columns: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """Path and class of each image of a table, unread."""
    found = recognise(data, ColumnsConfig(**(columns or {}))).find()
    assert not found.refused
    return sorted((candidate.path, candidate.name) for candidate in found.candidates)


def _csv_text(rows: list[tuple[str, ...]], delimiter: str = ",", end: str = "\n", header: str = "path,label") -> str:
    lines = [header.replace(",", delimiter), *(delimiter.join(row) for row in rows)]
    return end.join(lines) + end


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("plain.csv", lambda rows: _csv_text(rows).encode()),
        ("mark.csv", lambda rows: b"\xef\xbb\xbf" + _csv_text(rows).encode()),
        ("windows.csv", lambda rows: _csv_text(rows, end="\r\n").encode()),
        ("semicolons.csv", lambda rows: _csv_text(rows, ";").encode()),
        ("bars.CSV", lambda rows: _csv_text(rows, "|").encode()),
        ("tabs.tsv", lambda rows: _csv_text(rows, "\t").encode()),
        ("spaces.csv", lambda rows: _csv_text(rows, ", ").encode()),
        ("blank_lines.csv", lambda rows: _csv_text(rows, end="\n\n").encode()),
        ("quoted.csv", lambda rows: _csv_text([(f'"{path}"', f'"{label}"') for path, label in rows]).encode()),
        ("lines.jsonl", lambda rows: "\r\n".join(json.dumps({"path": p, "label": c}) for p, c in rows).encode()),
    ],
)
def test_forms_of_tables(folder: Path, name: str, write) -> None:
    rows = photographs(folder)
    (folder / name).write_bytes(write(rows))
    assert _named(folder / name) == rows


def test_commas_quotes_and_line_ends_in_cells(folder: Path) -> None:
    names = {"basalt": 'vesicular, "black"', "dolomite": "two\nlines", "marble": "Ünïcode"}
    rows = [(path, names[label]) for path, label in photographs(folder)]
    assert {name for _, name in _named(write_table(folder / "labels.csv", rows))} == set(names.values())


def test_numeric_labels_are_names(folder: Path) -> None:
    numbers = {"basalt": 0, "dolomite": 1, "marble": 10}
    text = "\n".join(json.dumps({"path": p, "label": numbers[c]}) for p, c in photographs(folder))
    (folder / "labels.jsonl").write_text(text)
    assert {name for _, name in _named(folder / "labels.jsonl")} == {"0", "1", "10"}


def test_columns_of_other_names(folder: Path) -> None:
    rows = [(label, path) for path, label in photographs(folder)]
    file = write_table(folder / "labels.csv", rows, ("species", "photo"))
    assert _named(file, {"image": "photo", "label": "species"}) == photographs(folder)


def test_splits_and_groups_of_a_table(folder: Path) -> None:
    splits = ["train", "Training", "VAL", "test"]
    rows = [(path, label, splits[i % 4]) for i, (path, label) in enumerate(photographs(folder))]
    manifest = _build(write_table(folder / "labels.csv", rows, ("path", "label", "split")))
    assert [manifest.class_counts(split) for split in ("train", "val", "test")] == [(2, 2, 2), (1, 1, 1), (1, 1, 1)]


def test_paths_are_relative_to_the_table_and_may_be_absolute_inside(folder: Path) -> None:
    rows = [(str(folder / path) if i % 2 else f"./x/../{path}", c) for i, (path, c) in enumerate(photographs(folder))]
    assert _named(write_table(folder / "labels.csv", rows)) == photographs(folder)


def test_rows_that_cannot_be_used_are_refused_with_the_reason(folder: Path) -> None:
    rows = photographs(folder)
    bad = [
        ("", "basalt"),
        ("basalt/gone.jpg", "basalt"),
        ("../outside.jpg", "basalt"),
        ("/etc/passwd", "basalt"),
        (rows[0][0], "  "),
        rows[1],
        ("basalt", "basalt"),
        ("zero\0byte.jpg", "basalt"),
        ("x" * 300 + ".jpg", "basalt"),
    ]
    manifest = _build(write_table(folder / "labels.csv", rows[1:] + bad))
    reasons = dict(manifest.refused)
    assert reasons == {
        "labels.csv, line 13": "line 13 of labels.csv has no path",
        "basalt/gone.jpg": "cannot be read (No such file or directory)",
        "../outside.jpg": f"lies outside of {folder}",
        "/etc/passwd": f"lies outside of {folder}",
        rows[0][0]: "line 17 of labels.csv has no label",
        rows[1][0]: "line 18 of labels.csv repeats line 2; it is used once",
        "basalt": "cannot be read (Is a directory)",
        "zero\\0byte.jpg": "cannot be read (No such file or directory)",
        "x" * 300 + ".jpg": "cannot be read (File name too long)",
    }
    assert len(manifest.images) == len(rows) - 1
    with pytest.raises(UserError, match=r"9 image\(s\) cannot be used"):
        _build(folder / "labels.csv", on_bad_image="fail")


def _table_of(text: str | bytes, name: str = "labels.csv"):
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder / name

    return write


def _rows(folder: Path, *more: tuple[str, ...], header: tuple[str, ...] = ("path", "label"), cell: str = "") -> Path:
    rows = [(*row, cell) if cell else row for row in photographs(folder)]
    return write_table(folder / "labels.csv", [*rows, *more], header)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            _table_of(""),
            "labels.csv: it has no column path or file_name; its columns are none; name the column in data",
        ),
        (_table_of("path,label\n"), "labels.csv: it holds no images; see docs/data.md for the forms of data sets"),
        (
            _table_of("a,b\n1,2\n"),
            "it has no column path or file_name; its columns are a, b; name the column in data.c",
        ),
        (
            _table_of("path,x\n1,2\n"),
            "it has no column label; its columns are path, x; name the column in data.columns.l",
        ),
        (_table_of("path,label,label\n"), "column label is there twice; rename one of the columns"),
        (_table_of(b"path,label\n\xe4.jpg,x\n"), "it is not UTF-8 (byte 11); save it as UTF-8"),
        (_table_of('path,label\n"a.jpg,x\n'), "line 2 is no line of a table (unexpected end of data); mend the quotes"),
        (
            _table_of("path,label\na.jpg,x,y\n"),
            "line 2 has 3 cells, and the first line 2 columns; write each cell that",
        ),
        (_table_of("{\n", "x.jsonl"), "x.jsonl: line 1 is no JSON object (Expecting property name"),
        (_table_of("[1]\n", "x.jsonl"), 'line 1 is no JSON object; write each image as {"path": ..., "label": ...}'),
        (
            _table_of('{"path": "a", "label": ["x", "y"]}\n', "x.jsonl"),
            "line 1 has a label that is neither a word nor a number (['x', 'y']); give each image one class",
        ),
        (lambda folder: _rows(folder, ("basalt/0000.jpg", "marble")), "line 14 says something else of basalt/0000.jpg"),
        (
            lambda folder: _rows(folder, header=("path", "label", "split"), cell="holdout"),
            "line 2 has the split 'holdout'; use train, val and test in column split of every row",
        ),
        (
            lambda folder: _rows(folder, ("x", "basalt", ""), header=("path", "label", "split"), cell="train"),
            "line 14 has no split; use train, val and test in column split of every row, or leave the column out",
        ),
        (
            lambda folder: _rows(folder, header=("path", "label", "split"), cell="val"),
            "it has images to val, but none to train; add training images",
        ),
        (
            lambda folder: _rows(folder, ("x", "slate", "val"), header=("path", "label", "split"), cell="train"),
            "1 class(es) have no training images (slate); give each class training images",
        ),
        (lambda folder: write_table(folder / "one.csv", photographs(folder)[:3]), "it holds one class only ('basalt')"),
        (
            _table_of("path,label\n,x\n,y\n"),
            "none of its 2 images can be used (labels.csv, line 2: line 2 of labels.csv",
        ),
    ],
)
def test_tables_that_cannot_be_used(folder: Path, write, message: str) -> None:
    file = write(folder)
    with pytest.raises(UserError) as error:
        _build(file)
    assert message in str(error.value) and str(error.value).startswith("--data ") and "\n" not in str(error.value)


def test_a_column_that_the_recipe_names_is_missing(folder: Path) -> None:
    file = _rows(folder, header=("path", "label"))
    with pytest.raises(UserError) as error:
        _build(file, columns={"label": "labels"})
    assert str(error.value) == f"data.columns.label labels: {file} has no such column; did you mean 'label'?"


def test_a_table_that_cannot_be_opened_is_named(folder: Path) -> None:
    os.mkfifo(folder / "pipe.csv")
    with pytest.raises(UserError, match=r"pipe.csv: cannot be read .not a regular file."):
        _build(folder / "pipe.csv")


def test_metadata_of_each_split(folder: Path, tmp_path: Path) -> None:
    """Hugging Face's folders: the images lie flat beside a table in each split."""
    data = tmp_path / "flat"
    for index, (path, label) in enumerate(photographs(folder)):
        place = data / ("validation" if index % 4 == 0 else "train")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / path, place / f"{label}{index}.jpg")
        with open(place / "metadata.jsonl", "a") as stream:
            stream.write(json.dumps({"file_name": f"{label}{index}.jpg", "label": label}) + "\n")
    manifest = build_manifest(data, CONFIG, 0)
    assert [manifest.class_counts(split) for split in ("train", "val", "test")] == [(3, 3, 3), (1, 1, 1), (0, 0, 0)]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"file_name,x\n", b"place,label\nx,y\n", b'"'])
def test_other_metadata_leave_the_classes_to_the_folders(folder: Path, content: bytes) -> None:
    (folder / "metadata.csv").write_bytes(content)
    assert _named(folder) == photographs(folder)


def test_a_split_without_a_class_is_mentioned(folder: Path) -> None:
    rows = [(path, label, "val" if path == "basalt/0000.jpg" else "train") for path, label in photographs(folder)]
    file = write_table(folder / "labels.csv", rows, ("path", "label", "split"))
    (notice,) = recognise(file, ColumnsConfig()).find().notices
    assert notice == ("split val", "has no images of 2 class(es): dolomite, marble")


def test_metadata_without_labels_leave_the_classes_to_the_folders(folder: Path) -> None:
    write_table(
        folder / "metadata.csv", [(path, "found in 1912") for path, _ in photographs(folder)], ("file_name", "text")
    )
    assert _named(folder) == photographs(folder)


def test_groups_never_lie_on_both_sides_of_a_split(rocks: Path, tmp_path: Path) -> None:
    shutil.copytree(rocks, tmp_path / "data")
    rows = [(path, label, f"specimen {label[0]}{i // 3 % 8}") for i, (path, label) in enumerate(photographs(rocks))]
    file = write_table(tmp_path / "data" / "labels.csv", rows, ("path", "label", "group"))
    config = DataConfig(images_per_class=1, val_fraction=0.25, test_fraction=0.25)
    manifest = build_manifest(file, config, 0)
    assert [manifest.class_counts(split) for split in ("train", "val", "test")] == [(12,) * 3, (6,) * 3, (6,) * 3]
    group_of = {path: group for path, _, group in rows}
    sides: dict[str, set[str]] = {}
    for image in manifest.images:
        sides.setdefault(group_of[image.path], set()).add(image.split)
    assert all(len(splits) == 1 for splits in sides.values())
    renamed = write_table(
        file, [(path, label, group + "!") for path, label, group in reversed(rows)], ("path", "label", "group")
    )
    assert build_manifest(renamed, config, 0) == manifest
    assert build_manifest(file, config, 1) != manifest


def test_groups_of_several_classes_and_of_uneven_sizes_stay_together(rocks: Path, tmp_path: Path) -> None:
    """A specimen of 16 photographs does not fit a tenth; one that shows two classes takes both where it goes."""
    shutil.copytree(rocks, tmp_path / "data")
    rows = []
    for index, (path, label) in enumerate(photographs(rocks)):
        number = index % 24
        group = f"large {label}" if number < 16 else f"shared {number}" if number < 20 else ""
        rows.append((path, label, group))
    file = write_table(tmp_path / "data" / "labels.csv", rows, ("path", "label", "group"))
    for seed in range(5):
        manifest = build_manifest(file, DataConfig(images_per_class=1), seed)
        assert all(0 < n <= 4 for split in ("val", "test") for n in manifest.class_counts(split))
        split_of = {image.path: image.split for image in manifest.images}
        for group in {group for *_, group in rows if group}:
            assert len({split_of[path] for path, _, other in rows if other == group}) == 1


def test_a_group_that_the_table_puts_into_two_splits_is_refused(folder: Path) -> None:
    rows = [(path, c, "train" if i % 2 else "val", "x") for i, (path, c) in enumerate(photographs(folder))]
    file = write_table(folder / "labels.csv", rows, ("path", "label", "split", "group"))
    with pytest.raises(UserError, match="group 'x' has images in val and in train; put each group into one split"):
        _build(file)
