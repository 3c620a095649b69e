"""The building of a manifest: splits, bad images, identical files, and messages for folders that do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError
from tests.helpers.listings import into_splits

CONFIG = DataConfig(images_per_class=2, classes_per_batch=None)


def _counts(manifest: Manifest) -> dict[str, list[int]]:
    """Images of each class in each split."""
    labels = manifest.labels
    splits = ("train", "val", "test")
    return {split: np.bincount(labels[manifest.ids(split)], minlength=3).tolist() for split in splits}


def _splits(manifest: Manifest) -> dict[str, str]:
    return {image.path: image.split for image in manifest.images}


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
    into_splits(folder, train=slice(0, 10), **{val: slice(10, 14)}, test=slice(14, 17))
    manifest = build_manifest(folder, CONFIG, seed=0)
    assert _counts(manifest) == {"train": [10] * 3, "val": [4] * 3, "test": [3] * 3}
    assert all(image.split == image.path.split("/")[0].removesuffix("idation") for image in manifest.images)


def test_train_and_val_have_no_test_split(folder: Path) -> None:
    into_splits(folder, train=slice(0, 10), val=slice(10, 14))
    assert _counts(build_manifest(folder, CONFIG, seed=0)) == {"train": [10] * 3, "val": [4] * 3, "test": [0] * 3}


@pytest.mark.parametrize("test_images", [0, 4])
def test_val_is_split_off_train_where_it_is_missing(folder: Path, test_images: int) -> None:
    into_splits(folder, train=slice(0, 20), **({"test": slice(20, 24)} if test_images else {}))
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
    assert [notice.subject for notice in manifest.notices] == ["hidden files", ".txt"]
    assert "basalt/deep/er/0000.JPeG" in _splits(manifest)


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
    into_splits(folder, val=slice(0, 10), test=slice(10, 14))
    return folder


def _classes_differ(folder: Path) -> Path:
    into_splits(folder, train=slice(0, 10), val=slice(10, 14))
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
            "val/ has classes that train/ lacks: 'granite'; of those of train/ it lacks 'marble'; give them the names",
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


def _all_refused(folder: Path) -> None:
    for file in (folder / "marble").iterdir():
        file.write_bytes(b"")


def test_a_class_of_refused_images_is_refused_with_the_table(folder: Path, capsys) -> None:
    _all_refused(folder)
    with pytest.raises(UserError) as error:
        build_manifest(folder, CONFIG, seed=0)
    assert str(error.value) == (
        f"--data {folder}: all images were refused of class 'marble' (24); the commonest reason: the file is empty; "
        "mend or replace the files of the table above, or move the folder away"
    )
    output = capsys.readouterr().out
    assert "24 image(s) refused" in output and "marble/0023.jpg" in output


def test_a_class_that_keeps_only_validation_images_is_refused(folder: Path) -> None:
    into_splits(folder, train=slice(0, 10), val=slice(10, 14))
    _all_refused(folder / "train")
    with pytest.raises(UserError, match=r"all images were refused of class 'marble' \(10\)"):
        build_manifest(folder, CONFIG, seed=0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_of_refused_images_is_refused(folder: Path, split: str, capsys) -> None:
    into_splits(folder, train=slice(0, 10), **{split: slice(10, 12)})
    for file in (folder / split).rglob("*.jpg"):
        file.write_text("<html>")
    with pytest.raises(
        UserError, match=rf"all images were refused of split {split} \(6\); the commonest reason: not a"
    ):
        build_manifest(folder, CONFIG, seed=0)
    assert "6 image(s) refused" in capsys.readouterr().out


def test_too_few_images_because_others_were_refused(folder: Path, capsys) -> None:
    for file in sorted((folder / "marble").iterdir())[:20]:
        file.write_bytes(b"")
    with pytest.raises(UserError) as error:
        build_manifest(folder, DataConfig(images_per_class=8), seed=0)
    assert (
        "class 'marble' has 2 training image(s), but a batch needs 8 of a class; 20 image(s) of the data were"
        in str(error.value)
    )
    assert error.value.hint.startswith("mend those, or add images of 'marble', or lower it to at most 2")
    assert "20 image(s) refused" in capsys.readouterr().out


def test_no_class_vanishes_whose_files_are_no_images_by_their_suffix(folder: Path) -> None:
    for file in (folder / "marble").iterdir():
        file.rename(file.with_suffix(".jfif"))
    for number, file in enumerate(sorted((folder / "basalt").iterdir())):
        file.rename(file.with_suffix(".JPE" if number % 2 else ".raw"))
    manifest = build_manifest(folder, CONFIG, seed=0)
    assert np.bincount(manifest.labels).tolist() == [12, 24, 24] and manifest.refused == ()
    (notice,) = manifest.notices
    assert notice.subject == ".raw" and "12 file(s) with the suffix of no image, in basalt/ (12)" in notice.text


def test_linked_class_folders_are_followed_and_links_above_are_not(folder: Path, tmp_path: Path) -> None:
    before = build_manifest(folder, CONFIG, seed=0)
    (folder / "marble").rename(tmp_path / "elsewhere")
    (folder / "marble").symlink_to(tmp_path / "elsewhere")
    for name in ("up", "up2"):
        (folder / "basalt" / name).symlink_to("..")
    manifest = build_manifest(folder, CONFIG, seed=0)
    assert manifest.hash == before.hash and len(manifest.notices) == 1


def test_own_outputs_do_not_change_the_manifest(folder: Path) -> None:
    before = build_manifest(folder, CONFIG, seed=0)
    run = folder / "runs" / "tiny-data"
    run.mkdir(parents=True)
    assert build_manifest(folder, CONFIG, seed=0).hash == before.hash
    (run / "recipe.yaml").touch()
    before.save(run / "manifest.json")
    shutil.copytree(folder / "marble", run / "samples")
    manifest = build_manifest(folder, CONFIG, seed=0)
    assert manifest.hash == before.hash
    assert [tuple(notice) for notice in manifest.notices] == [("runs/", "left out: outputs of this project's commands")]


def _copies(folder: Path) -> Path:
    """In splits: five test images of marble are training images, too, and two of basalt are among dolomite's."""
    into_splits(folder, train=slice(0, 10), val=slice(10, 13), test=slice(13, 18))
    for number in range(13, 18):
        shutil.copy(folder / "test" / "marble" / f"{number:04d}.jpg", folder / "train" / "marble")
    for number in range(2):
        shutil.copy(folder / "train" / "basalt" / f"{number:04d}.jpg", folder / "train" / "dolomite" / f"b{number}.jpg")
    return folder


def test_identical_files_are_counted(folder: Path) -> None:
    manifest = build_manifest(_copies(folder), CONFIG, seed=0)
    assert _counts(manifest) == {"train": [10, 12, 15], "val": [3] * 3, "test": [5] * 3} and manifest.refused == ()
    classes, splits = (notice.text for notice in manifest.notices)
    assert "two classes" in classes and "2 picture(s) in basalt and dolomite; such as train/basalt/0000.jpg" in classes
    assert (
        "two splits" in splits and "5 picture(s) in train and test; such as test/marble/0013.jpg and train/" in splits
    )


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_a_picture_are_on_one_side_of_a_split_that_is_drawn(folder: Path, seed: int) -> None:
    for number in range(12):
        shutil.copy(folder / "marble" / f"{number:04d}.jpg", folder / "marble" / f"again{number}.jpg")
        shutil.copy(folder / "basalt" / f"{number:04d}.jpg", folder / "dolomite" / f"b{number}.jpg")
    manifest = build_manifest(folder, CONFIG, seed=seed)
    split_of: dict[str, set[str]] = {}
    for image in manifest.images:
        split_of.setdefault(image.digest, set()).add(image.split)
    assert len(manifest.images) == 96 and all(len(splits) == 1 for splits in split_of.values())
    assert {next(iter(splits)) for splits in split_of.values()} == {"train", "val", "test"}
    assert not any("two splits" in notice.text for notice in manifest.notices)


def test_identical_files_are_dropped(folder: Path) -> None:
    manifest = build_manifest(_copies(folder), CONFIG.changed(on_duplicate="drop"), seed=0)
    assert _counts(manifest) == {"train": [8, 10, 10], "val": [3] * 3, "test": [5] * 3} and manifest.notices == ()
    reasons = dict(manifest.refused)
    assert len(reasons) == 9
    assert reasons["train/marble/0013.jpg"] == "the same picture as test/marble/0013.jpg, which stays"
    assert reasons["train/dolomite/b1.jpg"] == "the same picture as train/basalt/0001.jpg, which is in another class"
    assert len({image.digest for image in manifest.images}) == len(manifest.images)


def test_identical_files_stop_the_run_where_asked(folder: Path) -> None:
    with pytest.raises(UserError, match=r"identical files in two classes or more.*; identical files in two splits or"):
        build_manifest(_copies(folder), CONFIG.changed(on_duplicate="fail"), seed=0)
    shutil.rmtree(folder / "test")
    shutil.rmtree(folder / "train" / "dolomite")
    shutil.rmtree(folder / "val" / "dolomite")
    build_manifest(folder, CONFIG.changed(on_duplicate="fail"), seed=0)


def test_a_class_that_is_a_copy_of_another_is_refused(folder: Path) -> None:
    shutil.copytree(folder / "marble", folder / "copied")
    with pytest.raises(UserError, match=r"all images were refused of class 'copied' \(24\), class 'marble' \(24\)"):
        build_manifest(folder, CONFIG.changed(on_duplicate="drop"), seed=0)


def test_a_picture_twice_in_a_class_is_counted_and_kept_once(folder: Path) -> None:
    shutil.copy(folder / "marble" / "0000.jpg", folder / "marble" / "again.jpg")
    config = CONFIG.changed(val_fraction=0, test_fraction=0)
    (notice,) = build_manifest(folder, config, seed=0).notices
    assert "within a class and split: 1 picture(s), such as marble/0000.jpg and marble/again.jpg" in notice.text
    kept = build_manifest(folder, config.changed(on_duplicate="drop"), seed=0)
    assert [refused.path for refused in kept.refused] == ["marble/again.jpg"]
