"""A run is evaluated on its own images, moved or not, and on others; never on what it takes for its own by name."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Image, Manifest
from fpcn_dist.data.synthetic import generate
from fpcn_dist.models import build_model
from fpcn_dist.recipe.reading import dump_recipe
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.finish import evaluate_others, evaluate_run
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.model_folder import save_model
from fpcn_dist.runs.other_images import with_labels_of
from fpcn_dist.runtime.errors import UserError
from tests.helpers.distilling import ALONE


@pytest.fixture(scope="module")
def evaluated(rocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been evaluated, of a network that never learnt."""
    recipe = Recipe(
        model=ModelConfig(backbone="test_resnet", pretrained=False, hidden=16),
        data=DataConfig(resize=40, crop=32, images_per_class=4, threads=1),
    )
    run = RunFolder(tmp_path_factory.mktemp("evaluated"))
    manifest = build_manifest(rocks, recipe.data, seed=0)
    manifest.save(run.manifest)
    run.recipe.write_text(dump_recipe(recipe))
    torch.manual_seed(0)
    save_model(run.path, build_model(recipe.model, 3, task="contrast"), recipe, manifest.classes)
    evaluate_run(run, ALONE)
    return run.path


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(evaluated, tmp_path / "run")))


def _state(run: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_moved_images_are_still_the_runs_own(run: RunFolder, rocks: Path, tmp_path: Path) -> None:
    before = Evaluation.load(run.path)
    moved = Path(shutil.copytree(rocks, tmp_path / "elsewhere"))
    assert evaluate_run(run, ALONE, data=moved) == before
    # What is not measured need not be there.
    manifest = Manifest.load(run.manifest)
    for image in manifest.images:
        if image.split == "train":
            (moved / image.path).unlink()
    assert evaluate_run(run, ALONE, data=moved) == before


def test_other_images_of_the_same_names_are_refused(run: RunFolder, rocks: Path, tmp_path: Path) -> None:
    generate(tmp_path / "other", images_per_class=24, seed=9, min_side=48, max_side=64)
    before = _state(run)
    said = (
        r"--data .*other: of the run's 6 test images, 6 have other contents there \(basalt/.* and 1 more\); .*--split a"
    )
    with pytest.raises(UserError, match=said):
        evaluate_run(run, ALONE, data=tmp_path / "other")
    mixed = Path(shutil.copytree(rocks, tmp_path / "mixed"))
    first, second, *_ = [image.path for image in Manifest.load(run.manifest).images if image.split == "val"]
    shutil.copy(tmp_path / "other" / first, mixed / first)
    (mixed / second).unlink()
    said = rf"of the run's 6 val images, 1 have other contents there \({first}\) and 1 are not there \({second}\)"
    with pytest.raises(UserError, match=said):
        evaluate_run(run, ALONE, split="val", data=mixed)
    assert _state(run) == before


def test_a_new_labelled_folder_is_evaluated_beside_the_run(
    run: RunFolder, rocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _state(run)
    new = tmp_path / "new"
    for name in ("marble", "dolomite"):
        shutil.copytree(rocks / name, new / name)
    (new / "marble" / "text.jpg").write_text("no image")
    found = evaluate_others(run, ALONE, new)
    said = capsys.readouterr().out
    assert (found.split, found.images, found.data) == ("all", 48, str(new))
    assert [(score.name, score.images) for score in found.per_class] == [
        ("basalt", 0),
        ("dolomite", 24),
        ("marble", 24),
    ]
    assert "no images of 1 class(es) of the model: basalt" in said and "text.jpg" in said
    trained = sum(image.split == "train" and image.label > 0 for image in Manifest.load(run.manifest).images)
    assert f"the model was trained on {trained} of these images" in said
    written = run.path / "evaluation-new.json"
    assert Evaluation.load(run.path, written.name) == found
    assert {path: data for path, data in _state(run).items() if path != str(written)} == before

    # The confusion is that of the run's own numbering: its test images among others are counted alike.
    own = Evaluation.load(run.path)
    assert own is not None and evaluate_run(run, ALONE, split="train").confusion[0] != found.confusion[0] == (0, 0, 0)


def test_folders_of_one_name_do_not_share_a_file(run: RunFolder, rocks: Path, tmp_path: Path) -> None:
    places = [tmp_path / number / "[b] \n x" for number in "12"]
    for place in places:
        for name in ("marble", "dolomite"):
            (place / name).mkdir(parents=True)
            shutil.copy(rocks / name / "0000.jpg", place / name)
        evaluate_others(run, ALONE, place)
    files = sorted(run.path.glob("evaluation-*.json"))
    assert [json.loads(file.read_text())["data"] for file in files] == [str(places[1]), str(places[0])]
    assert files[1].name == "evaluation-[b] _ x.json"
    evaluate_others(run, ALONE, places[1])
    assert sorted(run.path.glob("evaluation-*.json")) == files


def test_a_class_that_the_model_does_not_know_is_named(run: RunFolder, rocks: Path, tmp_path: Path) -> None:
    for name in ("marble", "gneiss", "slate"):
        shutil.copytree(rocks / "marble", tmp_path / "new" / name)
    before = _state(run)
    with pytest.raises(UserError, match="the model knows no class 'gneiss', 'slate'; it knows 'basalt', 'dolomite', "):
        evaluate_others(run, ALONE, tmp_path / "new")
    assert _state(run) == before


def _manifest(*classes: str) -> Manifest:
    images = tuple(Image(f"{name}/x.jpg", label, "train", 1, str(label)) for label, name in enumerate(classes))
    return Manifest("root", classes, images, ())


def test_classes_are_matched_by_name_in_any_form_of_unicode() -> None:
    composed, decomposed = (unicodedata.normalize(form, "grès") for form in ("NFC", "NFD"))
    latin = os.fsdecode("grès".encode("latin-1"))
    own = _manifest("basalt", composed, latin)
    found = with_labels_of(own, _manifest(decomposed, latin))
    assert found.labels.tolist() == [1, 2] and found.without == ["basalt"]
    both = _manifest(decomposed, composed)
    assert with_labels_of(both, _manifest(composed, decomposed)).labels.tolist() == [1, 0]
