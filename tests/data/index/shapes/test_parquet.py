"""Parquet files: where images lie in them whatever the encoding, labels, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fpcn_dist.data import blob
from fpcn_dist.data.blob import Blob, Packed
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.shapes.recognise import recognise
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError
from tests.helpers.shapes import IMAGES, photographs, write_parquet

CONFIG = DataConfig(images_per_class=1, classes_per_batch=None)
NAMES = ("basalt", "dolomite", "marble")


@pytest.fixture(scope="module")
def rows(rocks: Path) -> list[tuple[str, str]]:
    """Six photographs of each class."""
    return [row for row in photographs(rocks) if row[0][-5] in "012345" and row[0][-6] == "0"]


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none"},
        {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "snappy", "row_group_size": 5},
        {"compression": "snappy", "use_dictionary": False, "data_page_size": 4000, "write_page_index": True},
        {"compression": "zstd", "data_page_version": "2.0", "dictionary_pagesize_limit": 8000},
        {
            "compression": "gzip",
            "use_dictionary": ["label"],
            "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"},
        },
        {"compression": "lz4"},
        {"compression": "brotli", "write_batch_size": 2},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_every_image_is_found_whatever_the_encoding(rocks: Path, rows, tmp_path: Path, options: dict) -> None:
    file = write_parquet(tmp_path / "a.parquet", rocks, [*rows, *rows[:2]], **options)
    found = recognise(file, CONFIG.columns).find()
    assert [candidate.path for candidate in found.candidates[2:18]] == [path for path, _ in rows[2:]]
    assert [c.path for c in found.candidates[-2:]] == ["a/000018", "a/000019"]  # a name that two rows have names none
    for candidate, (path, label) in zip(found.candidates, [*rows, *rows[:2]], strict=True):
        assert candidate.place is not None and candidate.name == label
        placed = candidate.place._replace(path=str(file))
        assert placed.read() == (rocks / path).read_bytes()
        assert (placed.packed is None) == (options["compression"] == "none")


def test_the_page_that_holds_an_image_is_read_alone(rocks: Path, rows, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", rocks, rows, use_dictionary=False, data_page_size=4000, write_batch_size=1)
    whole = (tmp_path / "a.parquet").stat().st_size
    for candidate in recognise(tmp_path / "a.parquet", CONFIG.columns).find().candidates:
        assert candidate.place is not None and candidate.place.size is not None
        assert candidate.place.size < whole / 6


def test_names_without_folders_are_those_of_their_classes(rocks: Path, rows, tmp_path: Path) -> None:
    """Hugging Face keeps the file's own name alone."""
    images = [{"bytes": (rocks / path).read_bytes(), "path": Path(path).name} for path, _ in rows]
    table = pa.table({"image": pa.array(images, IMAGES), "label": [label for _, label in rows]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [c.path for c in recognise(tmp_path, CONFIG.columns).find().candidates] == [path for path, _ in rows]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_without_a_struct(rocks: Path, rows, tmp_path: Path, kind: pa.DataType) -> None:
    images = pa.array([(rocks / path).read_bytes() for path, _ in rows], kind)
    labels = pa.array([label for _, label in rows]).dictionary_encode()
    splits = ["train", "val", "test"] * 6
    pq.write_table(pa.table({"img": images, "kind": labels, "part": splits}), tmp_path / "a.parquet")
    found = recognise(tmp_path / "a.parquet", ColumnsConfig(label="kind", split="part")).find().candidates
    assert [(c.path, c.name, c.split) for c in found] == [
        (f"a/{i:06d}", label, splits[i]) for i, (_, label) in enumerate(rows)
    ]
    for candidate, image in zip(found, images, strict=True):
        assert Blob.within(str(tmp_path), candidate.path, candidate.place).read() == image.as_py()


def test_rows_that_cannot_be_used_are_refused_with_the_reason(rocks: Path, rows, tmp_path: Path) -> None:
    images = [{"bytes": (rocks / path).read_bytes(), "path": path} for path, _ in rows]
    labels: list[int | None] = [NAMES.index(label) for _, label in rows]
    images += [{"bytes": None, "path": "/home/x.jpg"}, None, {"bytes": b"", "path": "empty.jpg"}, images[0], images[1]]
    labels += [0, 1, 2, None, -1]
    table = pa.table({"image": pa.array(images, IMAGES), "label": labels})
    described = pq.read_schema(write_parquet(tmp_path / "b.parquet", rocks, rows, NAMES)).metadata
    (tmp_path / "b.parquet").unlink()
    pq.write_table(table.replace_schema_metadata(described), tmp_path / "a.parquet")
    manifest = build_manifest(tmp_path, CONFIG, 0)
    assert manifest.classes == NAMES and len(manifest.images) == 18
    assert dict(manifest.refused) == {
        "/home/x.jpg": "row 18 of a.parquet holds no bytes, and names the file /home/x.jpg",
        "a.parquet, row 19": "row 19 of a.parquet holds no bytes",
        "marble/empty.jpg": "the file is empty",
        rows[0][0]: "row 21 of a.parquet has no label",
        rows[1][0]: "row 22 of a.parquet has no label",
    }


def _table(columns: dict, name: str = "a.parquet"):
    def write(folder: Path, whole: Path) -> Path:
        pq.write_table(pa.table(columns), folder / name)
        return folder

    return write


def _changed(change):
    def write(folder: Path, whole: Path) -> Path:
        (folder / "a.parquet").write_bytes(change(whole.read_bytes()))
        return folder

    return write


IMAGE = pa.array([{"bytes": b"x", "path": "x.jpg"}], IMAGES)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_table({"text": ["x"], "label": ["y"]}), "a.parquet: it has no column of images; its columns are text, label"),
        (_table({"image": IMAGE, "x": ["y"]}), "a.parquet: it has no column label; its columns are image, x; name the"),
        (
            _table({"image": IMAGE, "mask": IMAGE, "label": ["y"]}),
            "it has 2 columns of images (image, mask); its columns are image, mask, label; name one in data.col",
        ),
        (
            _table({"image": IMAGE, "label": [["y"]]}),
            "row 0 has a label that is neither a word nor a number (['y']); g",
        ),
        (
            _table({"image": IMAGE, "label": ["y"], "split": ["z"]}),
            "row 0 has the split 'z'; use train, val and test in",
        ),
        (_table({"image": IMAGE, "label": ["y"]}), "it holds one class only ('y'), and there is nothing to tell apart"),
        (_changed(lambda data: data[:-500]), "a.parquet: its images cannot be read (Parquet magic bytes not found"),
        (_changed(lambda data: b""), "a.parquet: its images cannot be read (Parquet file size is 0 bytes)"),
        (_changed(lambda data: data[:200] + bytes(4000) + data[4200:]), "a.parquet: its images cannot be read ("),
        (_changed(lambda data: b"PAR1" + bytes(500) + b"PAR1"), "a.parquet: its images cannot be read ("),
    ],
)
def test_files_that_cannot_be_used(rocks: Path, rows, tmp_path: Path, write, message: str) -> None:
    (tmp_path / "data").mkdir()
    whole = write_parquet(tmp_path / "whole.parquet", rocks, rows, NAMES)
    with pytest.raises(UserError) as error:
        build_manifest(write(tmp_path / "data", whole), CONFIG, 0)
    assert message in str(error.value) and str(error.value).startswith("--data ") and "\n" not in str(error.value)


def test_an_encoding_that_takes_images_apart_is_refused(rocks: Path, rows, tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "a.parquet", rocks, rows, use_dictionary=False, column_encoding={"image.bytes": "DELTA_BYTE_ARRAY"}
    )
    with pytest.raises(
        UserError, match=r"its images are stored in an encoding that takes them apart.*write it anew with py"
    ):
        build_manifest(tmp_path, CONFIG, 0)


def test_a_label_without_a_name(rocks: Path, rows, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", rocks, rows, NAMES)
    table = pq.read_table(file)
    metadata = {b"huggingface": table.schema.metadata[b"huggingface"].replace(b', "marble"', b"")}
    pq.write_table(table.replace_schema_metadata(metadata), file)
    with pytest.raises(UserError, match="row 12 has the label 2, and the file names 2 classes; write the file anew"):
        build_manifest(file, CONFIG, 0)


def test_pyarrow_is_named_where_it_is_missing(
    rocks: Path, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "a.parquet", rocks, rows, NAMES)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"Parquet files need pyarrow, which is not installed; pip install 'fpcn-dist\[par"
    ):
        recognise(file, CONFIG.columns).find()


def test_a_damaged_page_is_an_unreadable_image(rocks: Path, rows, tmp_path: Path) -> None:
    """What turns bad after the index was made is reported as any file that turns bad."""
    file = write_parquet(tmp_path / "a.parquet", rocks, rows, NAMES, use_dictionary=False)
    first = recognise(file, CONFIG.columns).find().candidates[0]
    placed = Blob.within(str(tmp_path), first.path, first.place)
    with open(file, "r+b") as stream:
        stream.seek(placed.offset)
        stream.write(b"\xff" * 64)
    with pytest.raises(OSError, match="the page that holds it is damaged"):
        placed.read()


def test_few_unpacked_pages_are_kept(rocks: Path, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"use_dictionary": False, "data_page_size": 4000, "write_batch_size": 1}
    file = write_parquet(tmp_path / "a.parquet", rocks, rows, **options)
    found = recognise(file, CONFIG.columns).find().candidates
    blobs = [Blob.within(str(tmp_path), c.path, c.place) for c in found]
    unpacked: list[int] = []
    unpack = Packed.unpack

    def counted(packed: Packed, data: bytes) -> bytes:
        unpacked.append(packed.unpacked)
        return unpack(packed, data)

    monkeypatch.setattr(Packed, "unpack", counted)
    monkeypatch.setattr(blob, "_PAGES", blob._Pages())
    for _ in range(2):
        assert [b.read() for b in blobs] == [(rocks / path).read_bytes() for path, _ in rows]
    pages = len({b.offset for b in blobs})
    assert len(unpacked) == pages > 6
    monkeypatch.setattr(blob, "_PAGES", blob._Pages())
    monkeypatch.setattr(blob, "_KEPT", max(unpacked))
    for b in [*blobs, *blobs]:
        b.read()
    assert len(unpacked) == 3 * pages
