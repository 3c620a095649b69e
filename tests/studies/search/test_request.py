"""What is asked of a search, before anything is started."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fpcn_dist.data.index.manifest import CHECK_FIELDS, SPLIT_FIELDS
from fpcn_dist.models.fpcn import region_name
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.search.request import SearchRequest, checked, feature_regions, make_plan, require_searchable
from tests.helpers.distilling import recipe

OTHER: dict[str, Any] = {
    "seed": 9,
    "data.split_seed": 9,
    "data.val_fraction": 0.3,
    "data.test_fraction": 0.3,
    "data.on_bad_image": "fail",
    "data.on_duplicate": "drop",
    "data.max_pixels": 10**6,
    "data.columns": ColumnsConfig(label="rock"),
    "data.resize": 48,
    "data.crop": 24,
    "data.fit": "pad",
}


@pytest.mark.parametrize("field", [*SPLIT_FIELDS, *CHECK_FIELDS, "data.resize", "data.crop", "data.fit"])
def test_a_student_of_a_joint_search_sees_its_teachers_images(field):
    teacher, student = recipe("contrast"), recipe("distill")
    checked(SearchRequest(teacher, "joint", student))
    with pytest.raises(UserError, match=re.escape(f"--student-recipe: {field} {OTHER[field]}: differs from")):
        checked(SearchRequest(teacher, "joint", student.changed(**{field: OTHER[field]})))


def test_a_student_of_a_joint_search_may_leave_its_pixels_to_the_teacher():
    cubic = {"data": {"interpolation": "bicubic"}}
    checked(SearchRequest(recipe("contrast", **cubic), "joint", recipe("distill")))
    checked(SearchRequest(recipe("contrast", **cubic), "joint", recipe("distill", **cubic)))
    with pytest.raises(UserError, match=r"--student-recipe: data\.interpolation bicubic: differs from .* has None"):
        checked(SearchRequest(recipe("contrast"), "joint", recipe("distill", **cubic)))


def test_soft_labels_depend_on_the_pixels():
    student = recipe("distill", search={"space": {"data.interpolation": {"choices": ["bilinear", "bicubic"]}}})
    with pytest.raises(UserError, match=r"search\.space\.data\.interpolation: cannot be searched"):
        require_searchable(SearchRequest(recipe("contrast"), "joint", student), classes=3)


def test_spaces_are_checked_before_there_is_a_cluster():
    hidden = recipe("contrast", search={"space": {"model.hidden": {"choices": [8, 16]}}})
    require_searchable(SearchRequest(hidden, "teacher"), classes=3)
    with pytest.raises(UserError, match=r"search\.space\.model\.hidden: cannot change while a network is trained"):
        require_searchable(SearchRequest(hidden, "teacher", scheduler="pbt"), classes=3)
    seed = recipe("distill", search={"space": {"seed": {"choices": [1, 2]}}})
    with pytest.raises(UserError, match=r"search\.space\.seed: cannot be searched"):
        require_searchable(SearchRequest(recipe("contrast"), "joint", seed), classes=3)


@pytest.mark.parametrize(
    ("sections", "regions"),
    [
        ({}, ["threshold, theta 0"]),
        ({"search": {"space": {"model.hidden": {"choices": [8, 16]}, "optim.lr": {"low": 0.01, "high": 0.1}}}}, None),
        (
            {
                "search": {
                    "space": {"model.region": {"choices": ["none", "largest"]}, "model.theta": {"choices": [0, 0.5]}}
                }
            },
            ["none", "largest, theta 0", "largest, theta 0.5"],
        ),
        (
            {
                "model": {"region": "largest"},
                "search": {
                    "space": {
                        "model.region": {"choices": ["none", "largest"]},
                        "model.companion": {"choices": [False, True]},
                    }
                },
            },
            ["none", "largest, theta 0", "largest with companion, theta 0"],
        ),
    ],
    ids=["lambda and pairs", "the head", "regions", "regions that do not all go together"],
)
def test_trials_of_a_frozen_backbones_head_share_its_features(sections, regions):
    chosen = recipe("contrast", optim={"freeze": "backbone"}, **sections)
    found = feature_regions(checked(SearchRequest(chosen, "teacher")), classes=3)
    assert found is not None and [region_name(config) for config in found] == (regions or ["threshold, theta 0"])


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"freeze": "none"}},
        {"optim": {"freeze": "backbone", "freeze_epochs": 1}},
        {"data": {"views": None}},
        {"train": {"feature_bank": False}},
        {"search": {"space": {"data.views": {"choices": [1, 2]}}}},
        {"search": {"space": {"model.theta": {"low": 0, "high": 0.5}}}},
        {"search": {"space": {"optim.freeze": {"choices": ["stem", "backbone"]}}}},
    ],
    ids=str,
)
def test_trials_whose_features_differ_share_none(sections):
    sections = {"optim": {"freeze": "backbone"}} | sections
    assert feature_regions(checked(SearchRequest(recipe("contrast", **sections), "teacher")), classes=3) is None


def test_each_trial_looks_its_features_up(tmp_path):
    frozen = SearchRequest(recipe("contrast", optim={"freeze": "backbone"}), "teacher")
    plan = make_plan(checked(frozen), tmp_path, 3, [{"CPU": 1}])
    assert plan.features and plan.main.train.feature_bank == str(tmp_path / "features")
    free = make_plan(checked(SearchRequest(recipe("contrast"), "teacher")), tmp_path, 3, [{"CPU": 1}])
    assert not free.features and free.main.train.feature_bank is True
