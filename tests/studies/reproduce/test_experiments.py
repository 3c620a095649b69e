"""Which runs the paper's tables need, and what each of them changes."""

from __future__ import annotations

import re

import pytest

from fpcn_dist.recipe.reading import load_recipe, recipe_from_dict
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.reproduce import paper
from fpcn_dist.studies.reproduce.experiments import SECTIONS, Grid, parse_sections
from tests.helpers.launching import ROOT

RECIPES = ROOT / "launch/recipes"
SYSTEMS = RECIPES / "compared"


def base(scale: str, **sections) -> Recipe:
    values = load_recipe(RECIPES / {"tiny": "fpcn_tiny.yaml", "paper": "fpcn_resnet101.yaml"}[scale]).model_dump()
    for name, change in sections.items():
        values[name] = values[name] | change if isinstance(change, dict) else change
    return recipe_from_dict(values, "test")


def grid(scale: str = "paper", only: str | None = None, seeds=(0,), classes: int = 3, **sections) -> Grid:
    return Grid(base(scale, **sections), SYSTEMS, scale, parse_sections(only), seeds, classes)


def test_sections_are_named():
    assert parse_sections(None) == SECTIONS
    assert parse_sections("figure3, table2") == ("table2", "figure3")
    with pytest.raises(UserError, match=r"--only table5: .*did you mean 'table[234]'"):
        parse_sections("table5")


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_every_row_of_the_paper_has_its_run(scale):
    runs = grid(scale).runs
    for name in [*paper.TABLE_2, *paper.TABLE_3, "baseline"]:
        assert f"{name}-seed0" in runs
    assert len(runs) == {"tiny": 20, "paper": 25}[scale]
    assert grid(scale, "table4").runs.keys() == {"fpcn-seed0"}, "students need their teacher"


def test_what_table_3_switches():
    runs = grid(only="table3").runs
    switches = {
        name.removesuffix("-seed0"): (r.model.region != "none", r.contrast.center_weight > 0, r.model.area_scale)
        for name, r in runs.items()
    }
    assert switches == {
        "mask": (True, False, False),
        "center": (False, True, False),
        "mask_alpha": (True, False, True),
        "mask_center": (True, True, False),
        "fpcn": (True, True, True),
    }


def test_figure_3_takes_more_pairs_of_the_same_batches():
    made = grid(only="figure3")
    found = {name: made.pairs(recipe) for name, recipe in made.of_section("figure3").items()}
    of = {s: sorted(n for name, n in found.items() if name.startswith(s)) for s in ("fpcn", "api_net", "pca_net")}
    assert of == {"fpcn": [84, 168, 336, 672, 42 * 42], "api_net": [84, 168, 336, 672], "pca_net": [42, 84, 168, 336]}
    assert {r.data.images_per_class for r in made.runs.values()} == {14}
    few = grid("tiny", "figure3", classes=7, data={"images_per_class": 4})
    assert max(few.pairs(r) for r in few.runs.values() if r.task == "pca_net") == 2 * 28, "of 3 other images a class"


@pytest.mark.parametrize(
    ("name", "task", "backbone"),
    [
        ("pca_net", "pca_net", "resnet101"),
        ("api_net", "contrast", "resnet101"),
        ("mmal_net", "mmal_net", "resnet50"),
        ("bilinear_cnn", "bilinear_cnn", "vgg16"),
        ("vgg16", "classify", "torchvision/vgg16"),
    ],
)
def test_systems_at_the_papers_scale(name, task, backbone):
    run = grid(only="table2").runs[f"{name}-seed0"]
    assert (run.task, run.model.backbone, run.model.pretrained) == (task, backbone, True)
    assert (run.data.crop, run.train.epochs, run.train.precision) == (448, 100, "bf16")


def test_a_system_keeps_nothing_of_fpcns_own_settings():
    odd = {"model": {"theta": 0.5, "region": "largest", "companion": True, "dropout": 0.3, "norm": "frozen_batch"}}
    runs = grid(only="table2", **odd, contrast={"center_weight": 9.0, "center_rate": 0.1}).runs
    assert runs["fpcn-seed0"].model.theta == 0.5 and runs["fpcn-seed0"].contrast.center_weight == 9.0
    api, pca, plain = (runs[f"{name}-seed0"] for name in ("api_net", "pca_net", "alexnet"))
    assert (api.model.region, api.model.theta, api.contrast.center_weight, api.model.dropout) == ("none", 0.0, 0.0, 0.5)
    assert (pca.contrast.center_weight, pca.contrast.center_rate) == (1.0, 0.05)
    assert plain.model.norm == "batch"


def test_all_from_scratch_all_with_one_optimizer():
    runs = grid(only="table2", model={"pretrained": False}, optim={"lr": 0.2}).runs
    assert not any(run.model.pretrained for run in runs.values())
    assert {n.removesuffix("-seed0"): r.optim.lr for n, r in runs.items() if r.optim.lr != 0.2} == {
        "pca_net": pytest.approx(0.02)
    }
    frozen = {n.removesuffix("-seed0") for n, r in runs.items() if r.optim.freeze == "backbone"}
    assert frozen == {"fpcn", "api_net", "bilinear_cnn"}


def test_seeds_share_the_images():
    runs = grid(only="table2", seeds=(5, 6), seed=5).runs
    assert {run.seed for run in runs.values()} == {5, 6} and len(runs) == 20
    assert {run.data.split_seed for run in runs.values()} == {5}
    assert {r.data.split_seed for r in grid(only="table2", data={"split_seed": 3}).runs.values()} == {3}


def test_students_see_what_their_teacher_saw(tmp_path):
    made = grid("tiny")
    student = made.student(4, tmp_path)
    assert (student.task, student.seed, student.distill.teacher) == ("distill", 4, str(tmp_path))
    assert student.data == made.runs["fpcn-seed0"].data.changed(views=4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"pretrained": "w.pth"}}, "model.pretrained w.pth: every system has other weights"),
        ({"model": {"region": "none"}}, "model.region none: is not FPCN as the paper"),
        ({"model": {"area_scale": False}}, "model.area_scale False: .*set it to true"),
        ({"contrast": {"center_weight": 0.0}}, "contrast.center_weight 0.0: .*use 0.5"),
        ({"contrast": {"pairs": "hardest"}}, "contrast.pairs hardest: .*set it to 'all'"),
        ({"task": "classify"}, "task classify: .*set it to 'contrast'"),
        ({"engine": {"name": "deepspeed"}}, "engine.name deepspeed: .*set it to 'ddp'"),
    ],
)
def test_what_is_not_the_papers_fpcn_is_refused(sections, message):
    with pytest.raises(UserError, match=message):
        grid(**sections)


def test_a_missing_system_is_named(tmp_path):
    with pytest.raises(UserError, match=f"system {re.escape(str(tmp_path))}.*restore launch/recipes/compared"):
        Grid(base("tiny"), tmp_path, "tiny", ("table2",), (0,), 3)
