"""A folder is walked through once, whatever links lead where, and what cannot be read is known."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fpcn_dist.data.index.folder.folders import Listing, find_files, find_images, is_image, list_folder
from fpcn_dist.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """DIR/a/1.jpg, DIR/b/1.jpg, DIR/b/deep/2.JFIF."""
    for path in ("a/1.jpg", "b/1.jpg", "b/deep/2.JFIF"):
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path).touch()
    return tmp_path / "data"


FOLDERS = {"": [], "a": ["1.jpg"], "b": ["1.jpg"], "b/deep": ["2.JFIF"]}


def test_files_of_each_folder(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "x.jpg").touch()
    (folder / "a" / ".DS_Store").touch()
    (folder / "empty").mkdir()
    expected = FOLDERS | {"a": [".DS_Store", "1.jpg"], "empty": []}
    assert list_folder(folder) == Listing(expected, {}, {})


def test_names_of_images() -> None:
    assert all(
        map(is_image, ["a.jpg", "a.JPE", "a.jfif", "a.b.Tiff", "a.heic", "a.HEIF", "a.avif", "a.gif", ".a.b.jpg"[1:]])
    )
    assert not any(map(is_image, ["a.txt", "jpg", ".jpg", "._a.jpg", "a.jpg.part", ""]))


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../.."])
def test_a_link_to_a_folder_above(folder: Path, target: str) -> None:
    for name in ("up", "up2"):
        (folder / "a" / name).symlink_to(target)
    same = {"..": "", ".": "a"}.get(target)
    assert list_folder(folder) == Listing(FOLDERS, {}, {"a/up": same, "a/up2": same})
    assert len(list(find_images(folder))) == 3


def test_a_link_to_a_folder_beside(folder: Path) -> None:
    (folder / "0").symlink_to("b")
    (folder / "a" / "deep").symlink_to("../b/deep")
    assert list_folder(folder) == Listing(FOLDERS, {}, {"0": "b", "a/deep": "b/deep"})


def test_links_to_folders_elsewhere(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (elsewhere / "3.png").touch()
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "self").symlink_to(".")
    (folder / "c").symlink_to(elsewhere)
    (folder / "d").symlink_to(elsewhere / "inner")
    (folder / "e").symlink_to(elsewhere)
    assert list_folder(folder) == Listing(
        FOLDERS | {"c": ["3.png"], "c/inner": []},
        {},
        {"c/back": "", "c/self": "c", "d": "c/inner", "e": "c"},
    )
    assert [path.relative_to(folder).as_posix() for path in find_images(folder)][-1] == "c/3.png"


def test_links_to_files_and_to_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "2.jpg").symlink_to("1.jpg")
    (folder / "a" / "3.jpg").symlink_to("nowhere")
    (folder / "a" / "loop.png").symlink_to("loop.png")
    (folder / "c").symlink_to(tmp_path / "unmounted")
    (folder / ".#lock").symlink_to("nowhere")
    found = list_folder(folder)
    assert found.folders == FOLDERS | {"a": ["1.jpg", "2.jpg", "3.jpg", "loop.png"]}
    assert found.unreadable == {"c": "a link: No such file or directory"} and found.same == {}


def test_folders_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read any folder
    found = list_folder(folder)
    assert found.unreadable == {"b/deep": "Permission denied"} and "b/deep" not in found.folders
    with pytest.raises(UserError, match=r"images .*/b/deep: cannot be read \(Permission denied\)"):
        find_files([folder])


def test_files_and_folders_to_predict(folder: Path) -> None:
    (folder / "predictions" / "overlays").mkdir(parents=True)
    for path in ("predictions.json", "predictions.csv", "overlays/1.png"):
        (folder / "predictions" / path).touch()
    paths = [folder / "b", folder / "a" / "1.jpg", folder]
    expected = ["b/1.jpg", "b/deep/2.JFIF", "a/1.jpg"]
    assert [path.relative_to(folder).as_posix() for path in find_files(paths)] == expected
    assert [path.name for path in find_files([folder / "predictions" / "overlays"])] == ["1.png"]
    shutil.rmtree(folder / "b")
    (folder / "b").mkdir()
    with pytest.raises(UserError, match=r"holds no images; images end in \.avif, \.bmp"):
        find_files([folder / "b"])
