"""Names of folders that are splits, that may be, and that are not."""

from __future__ import annotations

import pytest

from fpcn_dist.data.index.folder.splits import find_splits, may_be_split, parse

WORDS = {
    "train": "train Train TRAIN training Training trainset train_set train-data TrainImages",
    "val": "val Val VAL valid validation Validation dev eval evaluation val_set ValSet",
    "test": "test Test TEST testing Testing test_set test-images testset",
}


@pytest.mark.parametrize(("split", "name"), [(split, name) for split in WORDS for name in WORDS[split].split()])
def test_names_of_splits(split: str, name: str) -> None:
    found = parse(name)
    assert found is not None and found.plain and found.split == split


@pytest.mark.parametrize(
    "name", ["basalt", "trail", "testudo", "valley", "trains", "train_test", "invalid", "тест", ""]
)
def test_names_of_no_split(name: str) -> None:
    assert parse(name) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Training", "Testing"], {"Training": "train", "Testing": "test"}),
        (["seg_train", "seg_test", "seg_pred"], {"seg_train": "train", "seg_test": "test"}),
        (["train2017", "val2017"], {"train2017": "train", "val2017": "val"}),
        (["rocks-TRAIN", "rocks-VAL"], {"rocks-TRAIN": "train", "rocks-VAL": "val"}),
        (["train", "valid", "seg_test"], {"train": "train", "valid": "val"}),
        (["train", "val", "validation"], {"train": "train", "val": "val", "validation": "val"}),
        (["bullet_train", "steam_train", "tram"], None),
        (["crash_test", "dev_board"], None),
        (["basalt", "marble"], None),
        (["val", "basalt"], {"val": "val"}),
    ],
)
def test_splits_of_one_data_set(names: list[str], expected: dict[str, str] | None) -> None:
    assert find_splits(names) == ([] if expected is None else [expected])


def test_two_families_of_splits() -> None:
    assert len(find_splits(["raw_train", "raw_test", "seg_train", "seg_test"])) == 2


@pytest.mark.parametrize("name", ["val2", "trian", "tset_1_test", "holdout", "hold_out", "train_test", "validaton"])
def test_names_that_may_be_meant_as_splits(name: str) -> None:
    assert may_be_split(name)


@pytest.mark.parametrize("name", ["masks", "basalt", "brain", "annotations", "extra", "unlabelled", "2017", "тест"])
def test_names_that_are_meant_otherwise(name: str) -> None:
    assert not may_be_split(name)
