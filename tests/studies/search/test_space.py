"""What a search varies: drawn within bounds, valid as recipes, refused where it makes no sense."""

from __future__ import annotations

import random
import re

import optuna
import pytest

from fpcn_dist.recipe.schema import Dimension, Recipe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.search.space import Space

SMALL = {"data": {"classes_per_batch": None, "images_per_class": 4}}


def recipe(space: dict | None = None, **sections) -> Recipe:
    return Recipe.model_validate(SMALL | {"search": {"space": space or {}}} | sections)


def drawn(space: Space, count: int = 300) -> list[dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask()) for _ in range(count)]


def test_teacher_stage_draws_lambda_kind_and_number_of_pairs():
    space = Space(recipe(), "teacher", classes=3)
    trials = drawn(space)
    weights = [settings["contrast.center_weight"] for settings in trials]
    positive = [weight for weight in weights if weight]
    assert 0.05 < weights.count(0.0) / len(weights) < 0.2
    assert 1e-4 <= min(positive) < 1e-3 and 1 < max(positive) <= 10
    assert 0.3 < sum(weight < 10**-1.5 for weight in positive) / len(positive) < 0.7, "not by orders of magnitude"
    for settings in trials:
        made = space.recipe(settings)
        assert made.contrast.center_weight == settings["contrast.center_weight"]
        assert made.search == Recipe().search
        count = made.contrast.num_pairs
        assert space.count_pairs(settings) == (144 if made.contrast.pairs == "all" else count)
        if made.contrast.pairs == "all":
            assert count is None and "contrast.num_pairs" not in settings
        elif made.contrast.pairs == "random":
            assert 12 <= count <= 144
        elif made.contrast.pairs == "shifts":
            assert count % 12 == 0 and 12 <= count <= 144
        else:
            assert count % 24 == 0 and 24 <= count <= 144
    assert {settings["contrast.pairs"] for settings in trials} == {"all", "random", "shifts", "hardest"}


def test_student_stage_draws_temperature_and_alpha():
    trials = drawn(Space(recipe(task="distill", data={"views": 2}), "student", classes=3))
    assert all(1 <= t["distill.temperature"] <= 20 and 0 <= t["distill.alpha"] <= 1 for t in trials)


def test_pairs_follow_a_searched_batch():
    batches = {"data.images_per_class": {"choices": [4, 16]}}
    space = Space(recipe(batches), "teacher", classes=3)
    for settings in drawn(space):
        images = 3 * settings["data.images_per_class"]
        assert space.batch_size(settings) == images
        assert images <= space.count_pairs(settings) <= images**2
    assert max(space.count_pairs(settings) for settings in drawn(space)) > 144


def test_a_recipe_adds_fields_replaces_and_removes_those_of_the_stage():
    own = {
        "contrast.pairs": None,
        "contrast.num_pairs": None,
        "contrast.center_weight": {"choices": [0.1, 0.5]},
        "model.hidden": {"low": 8, "high": 64, "log": True},
    }
    space = Space(recipe(own), "teacher", classes=3)
    trials = drawn(space)
    assert set(trials[0]) == {"contrast.center_weight", "model.hidden"}
    assert {settings["contrast.center_weight"] for settings in trials} == {0.1, 0.5}
    hidden = [settings["model.hidden"] for settings in trials]
    assert all(isinstance(h, int) for h in hidden) and min(hidden) >= 8 and max(hidden) <= 64


def test_whole_numbers_of_a_range_are_those_within_it():
    space = Space(recipe({"train.micro_batches": {"low": 1.2, "high": 3.7}}), "teacher", classes=3)
    assert {settings["train.micro_batches"] for settings in drawn(space)} == {2, 3}


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({"low": 0.001, "high": float("inf")}, "finite number"),
        ({"low": float("nan"), "high": 1.0}, "finite number"),
        ({"low": 0.0, "log": True}, "low 0.0 has no logarithm"),
    ],
)
def test_ranges_that_are_none(dimension, message):
    with pytest.raises(ValueError, match=message):
        Dimension.model_validate(dimension)


def test_the_gated_head_keeps_its_pairs():
    gated = recipe(model={"head": "gated"}, contrast={"pairs": "hardest"})
    assert all("contrast.pairs" not in settings for settings in drawn(Space(gated, "teacher", classes=3)))


def test_perturbed_settings_stay_in_the_space():
    space = Space(recipe(), "teacher", classes=3)
    draw = random.Random(0)
    settings, seen = drawn(space)[0], set()
    for _ in range(300):
        settings = space.perturb(settings, draw)
        made = space.recipe(settings)
        seen.add(made.contrast.pairs)
        assert made.contrast.center_weight <= 10
        if made.contrast.pairs == "hardest":
            assert made.contrast.num_pairs is not None and made.contrast.num_pairs % 24 == 0
    assert seen == {"all", "random", "shifts", "hardest"}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optim.learning_rate": {"low": 1, "high": 2}}, "there is no such recipe field; did you mean"),
        ({"optim": {"choices": [1, 2]}}, "is a section, not a field; name one of its fields: name,"),
        ({"seed": {"low": 0, "high": 9}}, "cannot be searched: it decides which images validate"),
        ({"data.split_seed": {"low": 0, "high": 9}}, "cannot be searched: it decides which images validate"),
        ({"train.epochs": {"low": 1, "high": 9}}, "cannot be searched: trials are compared by epochs"),
        ({"distill.teacher": {"choices": ["a", "b"]}}, "all trials have the same teacher"),
        ({"model.norm": {"low": 0, "high": 1}}, "is no number, so it has no range; give choices"),
        ({"optim.lr": {"low": 0.1}}, "has no range; give low and high"),
        ({"optim.lr": {"low": -1, "high": 1}}, r"optim\.lr -1\.0: input should be greater than 0"),
        ({"model.backbone": {"choices": ["resnet18", 5]}}, r"model\.backbone 5: input should be a valid string"),
        ({f"contrast.{n}": None for n in ("pairs", "num_pairs", "center_weight")}, "leaves no field to search"),
        (
            {"contrast.num_pairs": None},
            "is not searched, and the recipe has no number of pairs, which random and shifts",
        ),
        ({"train.micro_batches": {"low": 1.2, "high": 1.8}}, "1.2 to 1.8: there is no whole number between them"),
        ({"model.hidden": {"low": 8, "high": 1e300}}, "its range reaches 2147483648 and beyond"),
        (
            {"contrast.num_pairs": {"low": 300, "log": True}, "data.images_per_class": {"low": 2, "high": 8}},
            "from 300 to 36: is empty for a batch of 6 images, data.images_per_class 2, which are 6 to 36 pairs",
        ),
        (
            {"contrast.num_pairs": {"high": 20}, "data.images_per_class": {"choices": [2, 8]}},
            "from 24 to 20: is empty for a batch of 24 images, data.images_per_class 8, which are 24 to 576 pairs",
        ),
    ],
)
def test_spaces_that_make_no_sense(space, message):
    with pytest.raises(UserError, match=message):
        Space(recipe(space), "teacher", classes=3)


def test_what_soft_labels_depend_on_is_not_searched_with_one_bank():
    student = recipe({"data.views": {"choices": [2, 4]}}, task="distill", data={"views": 2})
    with pytest.raises(UserError, match=r"data\.views: cannot be searched: all trials learn from the same soft labels"):
        Space(student, "student", classes=3)
    for name, choices in (("data.fit", ["pad", "squeeze"]), ("data.augment.hue", [0.0, 0.1])):
        student = recipe({name: {"choices": choices}}, task="distill", data={"views": 2})
        with pytest.raises(UserError, match=rf"{name}: cannot be searched: all trials learn from the same soft"):
            Space(student, "student", classes=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"choices": [1]}, "leave nothing to search"),
        ({"choices": [1, 2], "low": 0}, "choices and a range exclude each other"),
        ({"low": 2, "high": 1}, "low 2.0 is not below high 1.0"),
        ({"low": 0, "high": 1, "log": True}, "low 0.0 has no logarithm"),
    ],
)
def test_dimensions_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Dimension(**values)
