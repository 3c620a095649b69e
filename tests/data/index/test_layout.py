"""Classes, splits, what is left out and what is refused, told from a list of what a folder holds."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from fpcn_dist.data.index.layout import Candidate, Found, arrange, find
from fpcn_dist.runtime.errors import UserError
from tests.helpers.listings import listing

FLAT = {"basalt": 3, "dolomite": 3, "marble": 3}
TRAIN = {f"train/{name}": count for name, count in FLAT.items()}
FORMS = unicodedata.normalize("NFC", "märble"), unicodedata.normalize("NFD", "märble")


def counts(found: Found) -> dict[str | None, dict[str, int]]:
    """Images by split and class."""
    counted: dict[str | None, Counter[str]] = {}
    for candidate in found.candidates:
        counted.setdefault(candidate.split, Counter())[candidate.name] += 1
    return {split: dict(counter) for split, counter in counted.items()}


def notices(found: Found) -> str:
    return "\n".join(f"{notice.subject}: {notice.text}" for notice in found.notices)


def refusal(folders: dict, **options) -> str:
    with pytest.raises(UserError) as error:
        arrange(listing(folders, **options), "DIR")
    text = str(error.value)
    assert text.startswith("--data DIR: ") and "\n" not in text and error.value.hint
    return text


def test_class_folders() -> None:
    found = arrange(listing({"b": 1, "a/deep/er": 1, "a": ["x.JPeG"]}), "DIR")
    assert found.candidates == [
        Candidate("a/deep/er/0000.jpg", "a", None),
        Candidate("a/x.JPeG", "a", None),
        Candidate("b/0000.jpg", "b", None),
    ]
    assert found.notices == []


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Training", "Valid", "Testing"), ("TRAIN", "VAL", "TEST"), ("Train", "dev", "Test")]
    + [("seg_train", "seg_val", "seg_test"), ("train_set", "eval_set", "test_set")]
    + [("seg_train/seg_train", "seg_val/seg_val", "seg_test/seg_test"), ("train/train", "val", "test/Test")],
)
def test_names_of_splits_in_use(train: str, val: str, test: str) -> None:
    folders = {f"{place}/{name}": n for n, place in enumerate((train, val, test), 1) for name in FLAT}
    found = arrange(listing(folders), "DIR")
    assert counts(found) == {s: dict.fromkeys(FLAT, n) for n, s in enumerate(("train", "val", "test"), 1)}
    assert found.notices == []


def test_training_and_testing_alone() -> None:
    found = arrange(listing({"Training/a": 2, "Training/b": 2, "Testing/a": 1, "Testing/b": 1}), "DIR")
    assert counts(found) == {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (TRAIN | {"val/basalt": 1, "valid/basalt": 1}, "val/, valid/ are names of one split, val; keep one"),
        (TRAIN | {"val2/basalt": 1}, "it is unclear whether val2/ beside train/ are splits; call them"),
        (TRAIN | {"holdout": 5}, "it is unclear whether holdout/ beside train/ are splits; call them"),
        (
            {"trian/a": 2, "trian/b": 2, "tset_x/a": 1, "other/b": 1},
            "it is unclear whether trian/ are splits or classes; call them train/, val/ and test/",
        ),
        ({"train_1/a": 2, "train_2/a": 2, "c": 1}, "it is unclear whether train_1/, train_2/ are splits or classes"),
        (
            {f"{family}_{split}/a": 1 for family in ("raw", "seg") for split in ("train", "test")},
            "raw_test/, raw_train/ or seg_test/, seg_train/ may be its splits; move",
        ),
        (TRAIN | {"val": []}, "val/ (empty) holds no images; put images into val/<class>/, or remove the folder: data"),
        (TRAIN | {"val/basalt": ["a.csv", "b.csv"]}, "val/ (2 .csv) holds no images"),
        (TRAIN | {"test": []}, "test/ (empty) holds no images; put images into test/<class>/, or remove the folder: w"),
        ({"train": [], "test/a": 3}, "train/ (empty) holds no images; put images into train/<class>/"),
        (TRAIN | {"val": 50}, "val/ holds 50 image(s) and no class folders, so that their classes are not known; sort"),
        ({"train": 9}, "train/ holds 9 image(s) and no class folders; sort them into train/<class>/"),
        (
            FLAT | {"train": 9},
            "train/ holds 9 image(s) and no class folders; beside basalt/, dolomite/, marble/ it may be a class of "
            "that name, or the training images; if it is a class, put the folders of all classes into train/<class>/",
        ),
        (
            FLAT | {"train/steam": 9, "train/diesel": 9},
            "it is unclear whether train/ beside basalt/, dolomite/, marble/ is the training split or a class",
        ),
        (FLAT | {"test": 9}, "beside basalt/, dolomite/, marble/, test/ may be a class, or images without classes; if"),
        (FLAT | {"test/basalt": 9}, "it has test/ but no train/; put the training images into train/<class>/"),
        (
            TRAIN | {"val/basalt": 1, "val/granite": 1},
            "val/ has classes that train/ lacks: 'granite'; of those of train/ it lacks 'dolomite', 'marble'; give",
        ),
    ],
)
def test_splits_that_are_refused_by_name(folders: dict, message: str) -> None:
    assert message in refusal(folders)


def test_messages_list_ten_names_at_most() -> None:
    many = {f"class{number:03d}": 1 for number in range(200)}
    for text in (refusal(many | {"train": 1}), refusal(many | {f"empty{n}": [] for n in range(50)})):
        assert len(text) < 500 and " more" in text
    found = arrange(listing({f"train/{name}": 1 for name in many} | {"val/class000": 1}), "DIR")
    (notice,) = found.notices
    assert "no images of 199 class(es) of train/" in notice.text and notice.text.endswith(" and 189 more")


def test_test_images_without_classes_are_left_out_and_mentioned() -> None:
    for place in ("test", "test/test"):
        found = arrange(listing(TRAIN | {place: 7}), "DIR")
        assert counts(found) == {"train": FLAT}
        assert f"{place}/: left out: 7 image(s) without class folders" in notices(found)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_may_lack_rare_classes(split: str) -> None:
    found = arrange(listing(TRAIN | {f"{split}/basalt": 1, f"{split}/marble": []}), "DIR")
    assert counts(found) == {"train": FLAT, split: {"basalt": 1}}
    assert notices(found) == f"{split}/: has no images of 2 class(es) of train/: 'dolomite', 'marble'"


def test_classes_with_the_words_of_splits() -> None:
    names = ["bullet_train", "steam_train", "crash_test", "testudo", "trail", "invalid"]
    assert counts(arrange(listing(dict.fromkeys(names, 1)), "DIR")) == {None: dict.fromkeys(names, 1)}
    found = arrange(listing({f"train/{name}": 1 for name in ("train", "test", "val")}), "DIR")
    assert counts(found) == {"train": {"train": 1, "test": 1, "val": 1}}


def test_folders_beside_splits_are_left_out_and_mentioned() -> None:
    found = arrange(listing(TRAIN | {"masks/basalt": 4, "docs": ["a.txt"]}), "DIR")
    assert counts(found) == {"train": FLAT}
    assert notices(found) == "masks/: left out: 4 image(s) beside train/, and no split"


def test_images_in_no_class_folder_are_mentioned() -> None:
    found = arrange(listing(FLAT | {"": ["a.jpg", "README.md"]}), "DIR")
    assert counts(found) == {None: FLAT}
    assert notices(found) == "the data folder itself: left out: 1 image(s) that lie in no class folder"
    assert "train/: left out: 2 image(s) that lie" in notices(arrange(listing(TRAIN | {"train": 2}), "DIR"))


def test_other_files_are_counted_by_suffix() -> None:
    files = ["1.jpg", "2.jfif", "3.jpe", "4.GIF", "a.txt", "b.TXT", "c.cr2", "LICENSE", ".hidden.txt", "._5.jpg"]
    found = arrange(listing(FLAT | {"basalt": files, "marble/more": ["d.txt", "6.png"]}), "DIR")
    assert counts(found) == {None: {"basalt": 4, "dolomite": 3, "marble": 4}}
    assert notices(found).splitlines() == [
        "hidden files: left out: 1, such as basalt/._5.jpg",
        "no suffix: left out: 1 file(s) with the suffix of no image, in basalt/ (1)",
        ".cr2: left out: 1 file(s) with the suffix of no image, in basalt/ (1)",
        ".txt: left out: 3 file(s) with the suffix of no image, in basalt/ (2), marble/ (1)",
    ]


@pytest.mark.parametrize(
    ("held", "described"),
    [([], "raw/ (empty)"), (["a.cr2", "b.CR2", "c.txt"], "raw/ (2 .cr2, 1 .txt)"), ([".keep"], "raw/ (empty)")],
)
def test_class_folders_without_images_are_refused(held: list[str], described: str) -> None:
    expected = f"class folder(s) without a single image: {described}; put images into them, or move away"
    assert expected in refusal(FLAT | {"raw": held})


def test_one_class_whose_sub_folders_may_be_the_classes() -> None:
    text = refusal({"archive/basalt": 3, "archive/marble": 3})
    assert text.endswith("or give DIR/archive if its sub-folders are the classes")


def test_classes_with_the_same_sub_folders_are_mentioned() -> None:
    found = arrange(listing({f"{site}/{rock}": 1 for site in ("north", "south") for rock in FLAT}), "DIR")
    assert "sub-folders basalt, dolomite, marble: lie in every class (north, south)" in notices(found)


def test_folders_that_cannot_be_read_are_refused() -> None:
    text = refusal(FLAT, unreadable={"locked": "Permission denied", "marble/more": "Permission denied"})
    assert "it cannot be read whole: locked/ (Permission denied), marble/more/ (Permission denied); change" in text
    assert "the folder itself (Permission denied)" in refusal({}, unreadable={"": "Permission denied"})
    found = arrange(listing(FLAT | {"lost+found": []}, unreadable={"lost+found/x": "Permission denied"}), "DIR")
    assert counts(found) == {None: FLAT}


def test_links_to_folders_above_teach_nothing() -> None:
    same = {"marble/up": "", "marble/far": None, "all": "", "basalt/self": "basalt"}
    found = arrange(listing(FLAT, same=same), "DIR")
    assert counts(found) == {None: FLAT}
    links = "all/, basalt/self/, marble/far/, marble/up/"
    assert notices(found) == f"{links}: left out: a link to a folder above it"


def test_one_folder_in_a_class_by_two_links_is_used_once() -> None:
    found = arrange(listing(FLAT | {"marble/a": 1}, same={"marble/b": "marble/a"}), "DIR")
    assert notices(found) == "marble/b/: left out: the same folder as marble/a/, which is used already"


@pytest.mark.parametrize(
    ("folders", "link", "target"),
    [
        (FLAT, "schist", "marble"),
        (FLAT, "basalt/more", "marble"),
        (FLAT | {"basalt/more": 1}, "marble/more", "basalt/more"),
        (TRAIN | {"val/marble": 1}, "test", "val"),
        (TRAIN | {"val/marble": 1}, "val/basalt", "train/basalt"),
    ],
)
def test_one_folder_in_two_classes_or_splits_is_refused(folders: dict, link: str, target: str) -> None:
    assert f"{target}/ and {link}/ are the same folder" in refusal(folders, same={link: target})


@pytest.mark.parametrize("order", [FORMS, FORMS[::-1]])
def test_a_class_in_two_forms_of_unicode_is_one(order: tuple[str, str]) -> None:
    found = arrange(listing({"train/a": 1, f"train/{order[0]}": 2, "val/a": 1, f"val/{order[1]}": 1}), "DIR")
    assert counts(found) == {"train": {"a": 1, order[0]: 2}, "val": {"a": 1, order[0]: 1}}
    (notice,) = found.notices
    assert (
        "one class: its name is written in 2 ways" in notice.text and r"\xe4" in notice.text and notice.text.isascii()
    )
    found = arrange(listing({"a": 1, order[0]: 2, order[1]: 3}), "DIR")
    assert sorted(counts(found)[None].values()) == [1, 5]


def test_any_name_may_be_a_class() -> None:
    names = ["a,b", 'a"b', "a\nb", "<b>bold", "[unknown]", "😀", "bad\udce9name", "runs", "predictions", " "]
    assert counts(arrange(listing(dict.fromkeys(names, 1)), "DIR")) == {None: dict.fromkeys(names, 1)}
    assert r"a\nb/ (empty), bad\xe9/ (empty)" in refusal(FLAT | {"a\nb": [], "bad\udce9": []})


def test_own_outputs_and_thumbnails_are_left_out_and_mentioned() -> None:
    run = {"runs/x": ["recipe.yaml", "manifest.json"], "runs/x/samples": 5, "marble/@eaDir": 3, "__MACOSX/marble": 3}
    found = arrange(listing(FLAT | run), "DIR")
    assert counts(found) == {None: FLAT}
    assert notices(found).splitlines() == [
        "__MACOSX/: left out: what macOS adds to archives",
        "marble/@eaDir/: left out: thumbnails of a file server",
        "runs/: left out: outputs of this project's commands",
    ]


def test_a_folder_on_the_disk(rocks: Path) -> None:
    found = find(rocks)
    assert counts(found) == {None: {"basalt": 24, "dolomite": 24, "marble": 24}} and found.notices == []
    assert all((rocks / candidate.path).is_file() for candidate in found.candidates)
