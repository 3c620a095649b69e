"""The manifest: forms of folder, splits, a hash that follows what matters, and messages for folders that do not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.manifest import Manifest, build_manifest
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError

CONFIG = DataConfig(images_per_class=2, classes_per_batch=None)


@pytest.fixture
def folder(rocks: Path, tmp_path: Path) -> Path:
    """A private copy of the synthetic rocks."""
    return Path(shutil.copytree(rocks, tmp_path / "data"))


def _counts(manifest: Manifest) -> dict[str, list[int]]:
    """Images of each class in each split."""
    labels = manifest.labels
    splits = ("train", "val", "test")
    return {split: np.bincount(labels[manifest.ids(split)], minlength=3).tolist() for split in splits}


def _splits(manifest: Manifest) -> dict[str, str]:
    return {image.path: image.split for image in manifest.images}


def _into_splits(folder: Path, **shares: slice) -> None:
    """Move the images of each class into ``folder/<split>/<class>/``; what is in no share is deleted."""
    for source in [path for path in folder.iterdir() if path.is_dir()]:
        files = sorted(source.iterdir())
        for split, share in shares.items():
            (folder / split / source.name).mkdir(parents=True)
            for file in files[share]:
                file.rename(folder / split / source.name / file.name)
        shutil.rmtree(source)


def test_flat_folder_is_split_by_class(folder: Path) -> None:
    manifest = build_manifest(folder, DataConfig(images_per_class=2, val_fraction=0.25, test_fraction=0.125), seed=0)
    assert manifest.classes == ("basalt", "dolomite", "marble") and manifest.refused == ()
    assert _counts(manifest) == {"train": [15] * 3, "val": [6] * 3, "test": [3] * 3}
    assert [image.path for image in manifest.images] == sorted(image.path for image in manifest.images)
    for image_id, image in enumerate(manifest.images):
        assert manifest.blob(image_id) == Blob(str(folder / image.path))
        assert manifest.labels[image_id] == manifest.classes.index(image.path.split("/")[0])
        assert image.size == (folder / image.path).stat().st_size
    assert manifest.labels.dtype == manifest.ids("train").dtype == np.int64


def test_split_depends_on_seed_and_little_on_what_is_added(folder: Path) -> None:
    before = build_manifest(folder, CONFIG, seed=1)
    assert build_manifest(folder, CONFIG, seed=1) == before
    assert _splits(build_manifest(folder, CONFIG, seed=2)) != _splits(before)
    for name in before.classes:
        shutil.copy(folder / "basalt" / "0000.jpg", folder / name / "added.jpg")
        with open(folder / name / "added.jpg", "ab") as file:
            file.write(name.encode())
    after = _splits(build_manifest(folder, CONFIG, seed=1))
    assert sum(after[path] != split for path, split in _splits(before).items()) <= 2 * len(before.classes)


def test_zero_fractions_leave_everything_to_training(folder: Path) -> None:
    manifest = build_manifest(folder, DataConfig(images_per_class=2, val_fraction=0, test_fraction=0), seed=0)
    assert _counts(manifest) == {"train": [24] * 3, "val": [0] * 3, "test": [0] * 3}


def test_each_class_keeps_a_training_image(folder: Path) -> None:
    for source in folder.iterdir():
        for file in sorted(source.iterdir())[2:]:
            file.unlink()
    manifest = build_manifest(folder, DataConfig(images_per_class=1, val_fraction=0.4, test_fraction=0.4), seed=0)
    assert _counts(manifest) == {"train": [1] * 3, "val": [1] * 3, "test": [0] * 3}


@pytest.mark.parametrize("val", ["val", "validation"])
def test_folders_of_all_splits_are_taken_as_they_are(folder: Path, val: str) -> None:
    _into_splits(folder, train=slice(0, 10), **{val: slice(10, 14)}, test=slice(14, 17))
    manifest = build_manifest(folder, CONFIG, seed=0)
    assert _counts(manifest) == {"train": [10] * 3, "val": [4] * 3, "test": [3] * 3}
    assert all(image.split == image.path.split("/")[0].removesuffix("idation") for image in manifest.images)


def test_train_and_val_have_no_test_split(folder: Path) -> None:
    _into_splits(folder, train=slice(0, 10), val=slice(10, 14))
    assert _counts(build_manifest(folder, CONFIG, seed=0)) == {"train": [10] * 3, "val": [4] * 3, "test": [0] * 3}


@pytest.mark.parametrize("test_images", [0, 4])
def test_val_is_split_off_train_where_it_is_missing(folder: Path, test_images: int) -> None:
    _into_splits(folder, train=slice(0, 20), **({"test": slice(20, 24)} if test_images else {}))
    counts = _counts(build_manifest(folder, CONFIG, seed=0))
    assert counts == {"train": [18] * 3, "val": [2] * 3, "test": [test_images] * 3}


def test_suffixes_nesting_and_names_to_ignore(folder: Path) -> None:
    (folder / "basalt" / "deep" / "er").mkdir(parents=True)
    (folder / "basalt" / "0000.jpg").rename(folder / "basalt" / "deep" / "er" / "0000.JPeG")
    (folder / "basalt" / ".0001.jpg").write_text("left by a file manager")
    (folder / "basalt" / "notes.txt").write_text("found in 1912")
    (folder / ".thumbnails").mkdir()
    (folder / "readme.md").write_text("rocks")
    manifest = build_manifest(folder, CONFIG, seed=0)
    assert len(manifest.images) == 72 and manifest.classes == ("basalt", "dolomite", "marble")
    assert "basalt/deep/er/0000.JPeG" in _splits(manifest)


def test_hash_ignores_place_and_time(folder: Path, tmp_path: Path) -> None:
    before = build_manifest(folder, CONFIG, seed=0)
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    for file in moved.rglob("*.jpg"):
        os.utime(file, (0, 0))
    after = build_manifest(moved, CONFIG, seed=0)
    assert after.hash == before.hash and after.root != before.root


def test_hash_follows_content_name_split_and_class(folder: Path) -> None:
    hashes = [build_manifest(folder, CONFIG, seed=0).hash, build_manifest(folder, CONFIG, seed=1).hash]
    (folder / "basalt" / "0003.jpg").rename(folder / "basalt" / "renamed.jpg")
    hashes.append(build_manifest(folder, CONFIG, seed=0).hash)
    with open(folder / "basalt" / "renamed.jpg", "ab") as file:
        file.write(b"\0")
    hashes.append(build_manifest(folder, CONFIG, seed=0).hash)
    (folder / "basalt" / "renamed.jpg").unlink()
    hashes.append(build_manifest(folder, CONFIG, seed=0).hash)
    (folder / "basalt").rename(folder / "andesite")
    hashes.append(build_manifest(folder, CONFIG, seed=0).hash)
    assert len(set(hashes)) == len(hashes)


def test_written_manifest_reads_back(folder: Path, tmp_path: Path) -> None:
    (folder / "marble" / "0000.jpg").write_bytes(b"")
    manifest = build_manifest(folder, CONFIG, seed=0)
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    assert Manifest.from_json(manifest.to_json()).hash == manifest.hash


@pytest.mark.parametrize(
    "damage", [lambda text: "", lambda text: text[:-20], lambda text: text.replace("val", "train")]
)
def test_damaged_manifest_is_refused(folder: Path, tmp_path: Path, damage) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(damage(build_manifest(folder, CONFIG, seed=0).to_json()))
    with pytest.raises(UserError, match="cannot be read as a manifest"):
        Manifest.load(file)


def test_bad_images_are_left_out_and_listed(folder: Path) -> None:
    (folder / "basalt" / "0000.jpg").write_bytes(b"")
    (folder / "marble" / "0001.jpg").write_text("no image at all")
    manifest = build_manifest(folder, CONFIG, seed=0)
    assert [refused.path for refused in manifest.refused] == ["basalt/0000.jpg", "marble/0001.jpg"]
    assert manifest.refused[0].reason == "the file is empty"
    assert len(manifest.images) == 70 and "basalt/0000.jpg" not in _splits(manifest)


def test_bad_images_stop_the_run_where_asked(folder: Path) -> None:
    (folder / "basalt" / "0000.jpg").write_bytes(b"")
    config = DataConfig(images_per_class=2, on_bad_image="fail")
    with pytest.raises(UserError) as error:
        build_manifest(folder, config, seed=0)
    assert str(error.value) == (
        f"--data {folder}: 1 image(s) cannot be used (basalt/0000.jpg: the file is empty); "
        "mend or remove them, or set data.on_bad_image to 'skip'"
    )


def _missing(folder: Path) -> Path:
    return folder / "nowhere"


def _a_file(folder: Path) -> Path:
    return folder / "basalt" / "0000.jpg"


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _no_class_folders(folder: Path) -> Path:
    return folder / "basalt"


def _one_class(folder: Path) -> Path:
    shutil.rmtree(folder / "basalt")
    shutil.rmtree(folder / "dolomite")
    return folder


def _no_train(folder: Path) -> Path:
    _into_splits(folder, val=slice(0, 10), test=slice(10, 14))
    return folder


def _classes_differ(folder: Path) -> Path:
    _into_splits(folder, train=slice(0, 10), val=slice(10, 14))
    (folder / "val" / "marble").rename(folder / "val" / "granite")
    return folder


def _small_class(folder: Path) -> Path:
    for file in sorted((folder / "dolomite").iterdir())[3:]:
        file.unlink()
    return folder


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_missing, "there is no such folder; give a folder with one sub-folder of images for each class"),
        (_a_file, "it is not a folder; give a folder with one sub-folder of images for each class"),
        (_empty, "no sub-folder of"),
        (_no_class_folders, "no sub-folder of"),
        (_one_class, "it holds one class only ('marble'), and there is nothing to tell apart; add a folder of images"),
        (_no_train, "it has test/, val/ but no train/; put the training images into train/<class>/"),
        (
            _classes_differ,
            "the classes of its splits differ: 'marble' is only in train/, 'granite' is only in val/; give",
        ),
        (
            _small_class,
            "class 'dolomite' has 1 training image(s), but a batch needs 2 of a class; add images of 'dolom",
        ),
    ],
)
def test_folders_that_do_not_fit(folder: Path, arrange, message: str) -> None:
    root = arrange(folder)
    with pytest.raises(UserError) as error:
        build_manifest(root, CONFIG, seed=0)
    assert message in str(error.value)


def test_a_batch_of_more_classes_than_there_are_is_one_of_all(folder: Path) -> None:
    few, all_ = (DataConfig(classes_per_batch=count, images_per_class=2) for count in (4, None))
    assert build_manifest(folder, few, seed=0).hash == build_manifest(folder, all_, seed=0).hash
