"""Tar shards: names, labels, splits, and shards that are damaged."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.layout import Candidate
from fpcn_dist.data.index.shapes.recognise import recognise
from fpcn_dist.data.index.shapes.tar import expand
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError
from tests.helpers.shapes import examples, photographs, write_tar

CONFIG = DataConfig(images_per_class=1, classes_per_batch=None)


@pytest.fixture(scope="module")
def rows(rocks: Path) -> list[tuple[str, str]]:
    """Three photographs of each class."""
    return [row for row in photographs(rocks) if row[0][-5] in "012" and row[0][-6] == "0"]


def _find(data: Path, **columns: str) -> list[Candidate]:
    """The images of shards, unread."""
    found = recognise(data, ColumnsConfig(**columns)).find()
    assert not found.refused
    return found.candidates


def _labelled(rocks: Path, rows: list[tuple[str, str]], ending: str, form) -> list[tuple[str, bytes]]:
    members = []
    for path, label in rows:
        members += [(path, (rocks / path).read_bytes()), (path.replace("jpg", ending), form(label))]
    return members


@pytest.mark.parametrize(
    ("ending", "form"),
    [
        ("cls", lambda label: label.encode() + b"\n"),
        ("txt", lambda label: b"\xef\xbb\xbf" + label.encode()),
        ("json", lambda label: json.dumps({"label": label, "width": 96}).encode()),
        ("CLS", lambda label: label.encode()),
    ],
)
def test_labels(rocks: Path, rows: list[tuple[str, str]], tmp_path: Path, ending: str, form) -> None:
    shard = write_tar(tmp_path / "a.tar", _labelled(rocks, rows, ending, form))
    assert [(candidate.path, candidate.name) for candidate in _find(shard)] == rows


def test_labels_and_groups_of_json_by_column(rocks: Path, rows: list[tuple[str, str]], tmp_path: Path) -> None:
    members = _labelled(rocks, rows, "json", lambda c: json.dumps({"species": len(c), "from": c}).encode())
    shard = write_tar(tmp_path / "a.tar", members)
    found = [(candidate.name, candidate.group) for candidate in _find(shard, label="species", group="from")]
    assert found == [(str(len(label)), label) for _, label in rows]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(rocks: Path, rows: list[tuple[str, str]], tmp_path: Path, form: int) -> None:
    deep = "Gestein/" + "ö" * 90 + "/"
    members = [(deep + name, data) for name, data in examples(rocks, rows)]
    found = _find(write_tar(tmp_path / "a.tar", members, form))
    assert [candidate.path for candidate in found] == [deep + path for path, _ in rows]


def test_shards_of_the_tar_command(rocks: Path, rows: list[tuple[str, str]], tmp_path: Path) -> None:
    """As people make them, with folders, links and files of other kinds among the examples."""
    for name, data in examples(rocks, rows):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / "basalt" / "notes.md").write_text("found in 1912")
    (tmp_path / "in" / "basalt" / "._0000.jpg").write_text("left by a file manager")
    (tmp_path / "in" / "basalt" / "link.jpg").symlink_to("0000.jpg")
    subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", tmp_path / "in", "basalt", "dolomite", "marble"], check=True)
    assert sorted(candidate.path for candidate in _find(tmp_path / "a.tar")) == [path for path, _ in rows]


def test_names_that_several_shards_have_begin_with_the_shards(
    rocks: Path, rows: list[tuple[str, str]], tmp_path: Path
) -> None:
    for shard, part in (("s0", rows[0:9:3]), ("s1", rows[1:9:3])):
        photographs = [((rocks / path).read_bytes(), label.encode()) for path, label in part]
        named = [{f"{i}.jpg": jpeg, f"{i}.cls": label} for i, (jpeg, label) in enumerate(photographs)]
        write_tar(tmp_path / f"{shard}.tar", [member for example in named for member in example.items()])
    assert [candidate.path for candidate in _find(tmp_path)] == [f"s{i}/{k}.jpg" for i in range(2) for k in range(3)]


def test_pattern_of_shards(rocks: Path, rows: list[tuple[str, str]], tmp_path: Path) -> None:
    for index in range(9):
        write_tar(tmp_path / f"{index:02d}.tar", examples(rocks, rows[index : index + 1]))
    manifest = build_manifest(tmp_path / "{00..07}.tar", CONFIG, 0)
    assert len(manifest.images) == 8 and manifest.blob(7).read() == (rocks / rows[7][0]).read_bytes()


def test_expansion() -> None:
    assert expand("a-{08..11}.tar") == [f"a-{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert expand("plain.tar") == ["plain.tar"]


def test_examples_that_cannot_be_used_are_refused_with_the_reason(
    rocks: Path, rows: list[tuple[str, str]], tmp_path: Path
) -> None:
    photograph = (rocks / rows[0][0]).read_bytes()
    bad = [
        ("x/none.jpg", photograph),
        ("x/two.jpg", photograph),
        ("x/two.png", photograph),
        ("x/two.cls", b"basalt"),
        ("x/empty.jpg", photograph),
        ("x/empty.cls", b" \n"),
        ("x/text.jpg", b"no photograph"),
        ("x/text.cls", b"basalt"),
        ("x/alone.cls", b"basalt"),
        ("x/other.json", b'{"caption": "a rock"}'),
        ("x/other.jpg", photograph),
    ]
    manifest = build_manifest(write_tar(tmp_path / "a.tar", examples(rocks, rows) + bad), CONFIG, 0)
    assert len(manifest.images) == 9
    assert {path: reason.split(",")[0] for path, reason in manifest.refused} == {
        "x/none.jpg": "a.tar has no label beside it (.cls",
        "x/two.jpg": "the example has 2 images (x/two.jpg",
        "x/empty.jpg": "a.tar has no label beside it (.cls",
        "x/other.jpg": "a.tar has no label beside it (.cls",
        "x/text.jpg": "not a JPEG",
    }


def _damaged(change):
    def write(folder: Path, members: list[tuple[str, bytes]]) -> Path:
        shard = write_tar(folder / "a.tar", members)
        shard.write_bytes(change(shard.read_bytes()))
        return folder

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_damaged(lambda data: data[:5800]), "a.tar: it is no tar file, or damaged after "),
        (
            _damaged(lambda data: data[:5120]),
            "a.tar: it is no tar file, or damaged after 2 files (unexpected end of da",
        ),
        (
            _damaged(lambda data: data[: len(data.rstrip(b"\0")) // 512 * 512 + 512]),
            "files, the mark of a tar file's end is",
        ),
        (
            _damaged(lambda data: b""),
            "a.tar: it is no tar file, or damaged after 0 files (empty file); fetch or write the",
        ),
        (_damaged(lambda data: b"x" * 5000), "a.tar: it is no tar file, or damaged after 0 files (invalid header"),
        (lambda folder, members: write_tar(folder / "a.tar", []).parent, "it holds no images"),
        (lambda folder, members: write_tar(folder / "a.tar", members[:6]).parent, "it holds one class only ('basalt')"),
        (lambda folder, members: write_tar(folder / "a.tar.gz", members).parent, "a.tar.gz is compressed, so that no"),
        (lambda folder, members: write_tar(folder / "a.tgz", members), "a.tgz is compressed, so that no image of it"),
        (lambda folder, members: folder / "{0..1}.tar", "0.tar: cannot be read (No such file); check the shard"),
        (lambda folder, members: folder / "a.tar", "there is no such"),
        (
            lambda folder, members: write_tar(folder / "val-0.tar", members).parent,
            "it has images to val, but none to train; add training images",
        ),
        (
            lambda folder, members: write_tar(folder / "a.tar", [*members, ("x.jpg", b"x"), ("x.json", b"{")]),
            "a.tar: x.json is no JSON (Expecting property name",
        ),
        (
            lambda folder, members: write_tar(folder / "a.tar", [*members, ("x.jpg", b"x"), ("x.cls", b"\xff\xfe")]),
            "a.tar: x.cls is no label: it is not UTF-8, or larger than a megabyte; write labels as text",
        ),
    ],
)
def test_shards_that_cannot_be_used(
    rocks: Path, rows: list[tuple[str, str]], tmp_path: Path, write, message: str
) -> None:
    with pytest.raises(UserError) as error:
        build_manifest(write(tmp_path, examples(rocks, rows)), CONFIG, 0)
    assert message in str(error.value) and str(error.value).startswith("--data ") and "\n" not in str(error.value)


def test_shards_of_which_some_belong_to_no_split(rocks: Path, rows: list[tuple[str, str]], tmp_path: Path) -> None:
    for name in ("train-0.tar", "rest-0.tar"):
        write_tar(tmp_path / name, examples(rocks, rows))
    with pytest.raises(UserError, match=r"1 of its 2 files belong to no split \(rest-0.tar\), while others do; begin"):
        build_manifest(tmp_path, CONFIG, 0)


def test_archives_beside_classes_change_nothing(rocks: Path, rows: list[tuple[str, str]], tmp_path: Path) -> None:
    for name, data in examples(rocks, rows):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = _find(tmp_path)
    write_tar(tmp_path / "rocks.tar", examples(rocks, rows))
    assert _find(tmp_path) == before and len(before) == 9
