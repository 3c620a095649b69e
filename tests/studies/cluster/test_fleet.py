"""Which runs of an earlier call are at their end."""

from __future__ import annotations

from pathlib import Path

from fpcn_dist.recipe.preprocessing import IMAGENET, Preprocessing
from fpcn_dist.recipe.reading import dump_recipe
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.studies.cluster.fleet import survey
from tests.helpers.distilling import recipe

CUBIC = Preprocessing(interpolation="bicubic")


def _finished(output: Path, name: str, ran: Recipe) -> None:
    (output / name).mkdir()
    run = RunFolder(output / name)
    run.recipe.write_text(dump_recipe(ran))
    run.set_outcome("finished")


def test_a_run_whose_recipe_left_its_pixels_to_the_network_is_finished(tmp_path: Path) -> None:
    """The folder has what was settled, the grid's recipe does not; an old folder has neither."""
    left = recipe("classify")
    _finished(tmp_path, "settled", left.with_preprocessing(CUBIC))
    _finished(tmp_path, "old", left)
    _finished(tmp_path, "other", left.with_preprocessing(CUBIC))
    asked = {"settled": left, "old": left.with_preprocessing(IMAGENET), "other": left.with_preprocessing(IMAGENET)}
    assert survey(tmp_path, asked) == ({}, ["other"])
    assert survey(tmp_path, {"settled": left.changed(**{"data.threads": 7, "optim.lr": 0.5})}) == ({}, ["settled"])
    assert survey(tmp_path, {"settled": left.changed(**{"data.threads": 7})}) == ({}, [])
