"""The recipe schema and the command line: what is accepted, and what a user is told where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import ValidationError

from fpcn_dist.recipe import command_line
from fpcn_dist.recipe.augment import AugmentConfig
from fpcn_dist.recipe.reading import dump_recipe, load_recipe
from fpcn_dist.recipe.schema import DataConfig, Recipe
from fpcn_dist.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))


@dataclass(frozen=True)
class Args:
    """A command."""

    recipe: Path
    overrides: command_line.Overrides


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_survive_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_the_papers_setting():
    recipe = load_recipe(ROOT / "launch/recipes/fpcn_resnet101.yaml")
    assert (recipe.data.classes_per_batch, recipe.data.images_per_class) == (3, 14)
    assert (recipe.data.resize, recipe.data.crop) == (512, 448)
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.train.epochs) == (0.01, 0.9, 100)
    assert recipe.contrast.center_weight == 0.5
    assert (recipe.model.backbone, recipe.contrast.pairs) == ("resnet101", "all")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {learning_rat: 0.1}", ["optim.learning_rat", "no such recipe field"]),
        ("optim: {momentun: 0.1}", ["optim.momentun", "did you mean 'momentum'?"]),
        ("modle: {}", ["modle", "did you mean 'model'?"]),
        ("optim: {lr: fast}", ["optim.lr", "'fast'", "valid number"]),
        ("data: {crop: 0}", ["data.crop", "0", "greater than or equal to 1"]),
        ("data: {crop: 600}", ["data", "crop 600 is larger than resize 512", "lower crop"]),
        ("contrast: {pairs: random}", ["contrast.pairs 'random' needs contrast.num_pairs", "number of pairs"]),
        ("task: pca_net", ["task 'pca_net'", "'all'", "set it to 'random'"]),
        ("contrast: {num_pairs: 9}", ["num_pairs 9", "'all'", "use 'random'"]),
        ("model: {head: gated}", ["'gated'", "hardest"]),
        ("model: {companion: true}", ["companion", "'largest'"]),
        ("engine: {zero_stage: 2}", ["zero_stage 2", "'deepspeed'"]),
        ("optim: {ema_decay: 0.9}\nengine: {name: deepspeed, zero_stage: 3}", ["ema_decay", "zero_stage 3"]),
        ("data: {fit: stretch}", ["data.fit", "'stretch'", "'squeeze'"]),
        ("data: {augment: {random_resized_crop: [0.9, 0.1]}}", ["random_resized_crop 0.9 0.1", "use 0.08 1.0"]),
        ("data: {augment: {ratio: [0, 1]}}", ["data.augment", "ratio 0.0 1.0 is no range above 0"]),
        ("data: {augment: {hue: 0.7}}", ["data.augment.hue", "less than or equal to 0.5"]),
        ("data: {augment: {brightnes: 0.7}}", ["data.augment.brightnes", "did you mean 'brightness'?"]),
        ("data: {augment: {mixup: 0.2}}", ["data.augment.mixup 0.2", "'contrast' contrasts pairs", "set it to 0"]),
        ("task: pca_net\ncontrast: {pairs: random}\ndata: {augment: {cutmix: 1}}", ["cutmix 1.0", "'pca_net'"]),
        ("task: mmal_net\ndata: {augment: {cutmix: 1}}", ["cutmix 1.0", "'mmal_net' looks for one object"]),
        ("task: distill\ndata: {views: 4, augment: {mixup: 1}}", ["mixup 1.0", "holds no logits", "use 'online'"]),
        ("data: {class_weights: inverse}", ["data.class_weights 'inverse'", "task 'contrast'", "set it to 'none'"]),
        (
            "task: classify\ndata: {augment: {region: crop}}",
            ["region 'crop' needs", "'classify'", "task to 'contrast'"],
        ),
        ("data: {augment: {region: drop}}\nmodel: {region: none}", ["region 'drop' finds no region", "'threshold'"]),
        ("data: {fit: short_side, augment: {region: crop}}", ["data.fit is 'short_side'", "use 'squeeze' or 'pad'"]),
        ("data: {augment: {region: crop, policy: rand}}", ["turned or sheared", "set that to 'none'"]),
        ("data: {views: 1, augment: {region: crop}}", ["data.views is 1", "raise it to 2 or more"]),
        ("data: {augment: {region: crop}}\ntrain: {micro_batches: 2}", ["micro_batches 2 computes", "set that to 1"]),
        ("- 1", ["mapping"]),
        ("a: [", ["not YAML"]),
        ("task: segment", ["task", "'segment'"]),
        ("task: distill", ["teacher_mode 'bank' needs data.views", "use 'online'"]),
        ("data: {views: 0}", ["data.views", "0", "greater than or equal to 1"]),
        ("distill: {teacher_mode: offline}", ["distill.teacher_mode", "'offline'", "'online'"]),
        ("distill: {temperature: 0}", ["distill.temperature", "greater than 0"]),
        ("distill: {alpha: 1.5}", ["distill.alpha", "less than or equal to 1"]),
        ("distill: {beta: -1}", ["distill.beta", "greater than or equal to 0"]),
        (
            "task: distill\ndistill: {teacher_mode: online, beta: 2}\ndata: {augment: {mixup: 0.2}}",
            ["distill.beta 2.0", "data.augment.mixup 0.2", "drop distill.beta"],
        ),
        ("distill: {techer: x}", ["distill.techer", "did you mean 'teacher'?"]),
    ],
)
def test_bad_recipes_are_explained(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "task: classify\ndata: {class_weights: inverse, augment: {mixup: 0.2, cutmix: 1}}",
        "task: distill\ndistill: {teacher_mode: online}\ndata: {class_weights: effective, augment: {mixup: 0.2}}",
        "task: bilinear_cnn\ndata: {augment: {cutmix: 1}}",
        "data: {augment: {random_resized_crop: [0.08, 1], hue: 0.1, policy: rand, erasing: 0.1}}",
    ],
)
def test_what_tasks_allow(tmp_path, text):
    load_recipe(write(tmp_path, text))


def test_missing_recipe_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "absent.yaml")


def test_overrides_reach_every_section_and_launchers_flags_are_ignored(tmp_path):
    path = write(tmp_path, "optim: {lr: 0.5}\ntrain: {epochs: 7}")
    argv = ["--local_rank=1", "--recipe", str(path), "--optim.momentum", "0.8", "--data.images_per_class", "6"]
    argv += ["--contrast.pairs", "random", "--contrast.num-pairs", "99", "--local-rank=0"]
    recipe = command_line.parse(Args, argv).overrides
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.train.epochs) == (0.5, 0.8, 7)
    assert (recipe.data.images_per_class, recipe.contrast.num_pairs) == (6, 99)


def test_ranges_are_two_words_or_a_list_and_survive_a_round_trip(tmp_path):
    path = write(tmp_path, "data: {augment: {random_resized_crop: [0.2, 1]}}")
    recipe = load_recipe(path)
    assert recipe.data.augment.random_resized_crop == (0.2, 1.0)
    argv = ["--recipe", str(path), "--data.augment.random-resized-crop", "0.08", "1", "--data.fit", "pad"]
    changed = command_line.parse(Args, argv).overrides
    assert (changed.data.augment.random_resized_crop, changed.data.fit) == ((0.08, 1.0), "pad")
    assert load_recipe(write(tmp_path, dump_recipe(changed))) == changed
    assert json.loads(json.dumps(changed.model_dump())) == changed.model_dump()  # as checkpoints keep it
    argv = ["--recipe", str(path), "--data.augment.random-resized-crop", "None"]
    assert command_line.parse(Args, argv).overrides.data.augment.random_resized_crop is None


def test_the_last_recipe_counts(tmp_path):
    first, last = write(tmp_path, "train: {epochs: 7}"), tmp_path / "last.yaml"
    last.write_text("train: {epochs: 9}")
    args = command_line.parse(Args, ["--recipe", str(first), f"--recipe={last}"])
    assert args.recipe == last and args.overrides.train.epochs == 9


@pytest.mark.parametrize(
    ("word", "value"), [("false", False), ("False", False), ("true", True), ("weights/false.pth", "weights/false.pth")]
)
def test_pretrained_is_a_truth_or_a_file(tmp_path, word, value):
    argv = ["--recipe", str(write(tmp_path, "{}")), "--model.pretrained", word]
    assert command_line.parse(Args, argv).overrides.model.pretrained == value


def test_short_names_of_what_a_distillation_is_asked_for_most(tmp_path):
    path = write(tmp_path, "task: distill\ndata: {views: 16}")
    assert load_recipe(path).distill.teacher_mode == "bank"
    recipe = command_line.parse(Args, ["--recipe", str(path), "--views", "4", "--teacher-mode", "online"]).overrides
    assert (recipe.data.views, recipe.distill.teacher_mode) == (4, "online")
    long = ["--recipe", str(path), "--data.views", "4", "--distill.teacher-mode", "online"]
    assert command_line.parse(Args, long).overrides == recipe
    every_time_anew = load_recipe(write(tmp_path, "task: distill\ndistill: {teacher_mode: online}"))
    assert every_time_anew.data.views is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lrr", "1"], ["--optim.lr"]),
        (["--optim.lr", "fast"], ["fast"]),
        (["--data.crop", "4000"], ["crop 4000 is larger than resize 512"]),
        ([], ["--recipe"]),
    ],
)
def test_bad_overrides_are_explained(tmp_path, capsys, argv, words):
    recipe = ["--recipe", str(write(tmp_path, "{}"))] if argv else []
    with pytest.raises(SystemExit) as caught:
        command_line.parse(Args, [*recipe, *argv])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    for word in words:
        assert word in shown.out + shown.err


def test_help_needs_no_torch():
    program = "import sys, fpcn_dist.recipe.command_line, fpcn_dist.recipe.schema; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_help_tells_every_field():
    shown = subprocess.run(
        [sys.executable, ROOT / "launch/train.py", "--help"], check=True, capture_output=True, text=True
    ).stdout
    for section, fields in Recipe.model_fields.items():
        if section == "search":
            continue  # a mapping of any depth: it is written in the recipe file alone
        nested = getattr(fields.annotation, "model_fields", {})
        for name in nested:
            assert f"--{section}.{name.replace('_', '-')}" in shown


def test_changed_fields_are_validated():
    recipe = Recipe().changed(**{"optim.lr": 0.5, "name": "other"})
    assert (recipe.optim.lr, recipe.name, recipe.optim.momentum) == (0.5, "other", Recipe().optim.momentum)
    assert recipe.data.changed(views=3).views == 3 and Recipe().optim.lr != 0.5
    for wrong in ({"optim.lr": -1}, {"optim.rate": 1}, {"data.crop": 10_000}, {"task": "distill"}):
        with pytest.raises(ValidationError):
            Recipe().changed(**wrong)


def test_batch_size_of_all_classes_or_some():
    assert DataConfig(classes_per_batch=3, images_per_class=14).batch_size(7) == 42
    assert DataConfig(classes_per_batch=None, images_per_class=14).batch_size(7) == 98
    assert DataConfig(classes_per_batch=24, images_per_class=14).batch_size(7) == 98
    everything = DataConfig(classes_per_batch=None, images_per_class=None)
    assert everything.batch_size(7, 1300) == 1300
    with pytest.raises(UserError, match="all training images in each batch are for training alone"):
        everything.batch_size(7)
    with pytest.raises(ValidationError, match="set classes_per_batch to null, too"):
        DataConfig(images_per_class=None)
    with pytest.raises(ValidationError, match="needs engine"):
        Recipe().changed(data=everything.model_dump(), engine={"name": "deepspeed"})


def test_what_decides_the_pixels_of_a_view():
    """Whatever is added to the section does, unless it is said not to."""
    shown = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear"}
    shown |= {"resize": 512, "crop": 448, "fit": "squeeze", "flip": True, "views": None}
    augment = AugmentConfig().model_dump(mode="json", exclude={"mixup", "cutmix", "region"})
    assert DataConfig().pixels() == shown | {f"augment.{name}": value for name, value in augment.items()}
    whole_image = DataConfig(resize=448, flip=False)
    assert (whole_image.distinct_views, whole_image.views_are_drawn) == (1, False)
    assert (DataConfig().distinct_views, DataConfig(views=4).distinct_views) == (None, 4)
    assert DataConfig(resize=448, views=3).distinct_views == 3
