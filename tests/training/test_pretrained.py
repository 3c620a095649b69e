"""A network is shown images as its weights were trained, from the first step to the exported model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.backends import has_dali
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.models import Classifier
from fpcn_dist.recipe.preprocessing import IMAGENET, Preprocessing
from fpcn_dist.recipe.schema import DataConfig, DecodingBackend, ModelConfig, Recipe
from fpcn_dist.runs.checkpoint import BEST, CheckpointInfo, TrainingState, write_checkpoint
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.model_folder import load_model
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.training.loop import train, train_together
from fpcn_dist.training.pretrained import describe_weights, name_preprocessing
from tests.helpers.distilling import ALONE, CPU, make_teacher, recipe
from tests.helpers.launching import ROOT, losses

HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Of timm's test_resnet."""
OWN = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic")
CLASSES = ("basalt", "dolomite", "marble")
LITE0 = ROOT.parent / "shared/weights/tf_efficientnet_lite0.safetensors"
needs_lite0 = pytest.mark.skipif(not LITE0.is_file(), reason="needs ../shared/weights")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of timm's test_resnet, which wants other images than ImageNet's."""
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    torch.manual_seed(1)
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


# --- the same pixels as timm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("tf_efficientnet_lite0", marks=needs_lite0)])
@pytest.mark.parametrize(
    "backend",
    ["torchvision", pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="needs DALI"))],
)
def test_logits_are_those_of_timms_own_pipeline(
    name: str, backend: DecodingBackend, weights: Path, tmp_path: Path
) -> None:
    """From the file to the logits. The photographs are squares that need no resizing, so that pixels are the same."""
    path = LITE0 if name == "tf_efficientnet_lite0" else weights
    theirs = timm.create_model(name, num_classes=1000).eval()
    theirs.load_state_dict(safetensors.torch.load_file(path))
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=theirs))
    crop = theirs.pretrained_cfg["input_size"][1]
    side = int(crop / theirs.pretrained_cfg["crop_pct"])
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file in files:
        rough = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        rough.resize((side, side), Image.Resampling.BICUBIC).save(file)

    left = Recipe(
        task="classify",
        data=DataConfig(backend=backend, resize=side, crop=crop, threads=1),
        model=ModelConfig(backbone=name, pretrained=str(path)),
    )
    (batch,), (as_imagenet,) = (
        EvalLoader(Blob.of_files(files), np.zeros(3), np.arange(3), chosen.data, rank=0, world_size=1, device=CPU)
        for chosen in (name_preprocessing(left), left.with_preprocessing(IMAGENET))
    )
    ours = Classifier(name, 1000, pretrained=str(path)).eval()
    ours.classifier.load_state_dict(theirs.get_classifier().state_dict())
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(file)) for file in files])
        torch.testing.assert_close(batch.images, pixels, rtol=0, atol=1e-6)
        expected = theirs(pixels)
        torch.testing.assert_close(ours(batch.images), expected, rtol=0, atol=1e-4)
        assert (ours(as_imagenet.images) - expected).abs().max() > 0.1 * expected.abs().max()


# --- what is settled --------------------------------------------------------------------------------------------------


def shown(**sections) -> Preprocessing:
    return name_preprocessing(recipe("classify", **sections)).data.preprocessing


def test_the_weights_decide_and_the_recipe_overrules_them(weights: Path) -> None:
    assert shown() == IMAGENET  # from scratch, whatever weights there are
    assert shown(model={"pretrained": str(weights)}) == shown(model={"pretrained": True}) == HALF
    lite = {"backbone": "tf_efficientnet_lite0", "pretrained": "packaged"}
    assert shown(model=lite) == Preprocessing(mean=HALF.mean, std=HALF.std, interpolation="bicubic")
    mixed = shown(model={"pretrained": True}, data={"std": (0.1, 0.2, 0.3), "interpolation": "bicubic"})
    assert mixed == Preprocessing(mean=HALF.mean, std=(0.1, 0.2, 0.3), interpolation="bicubic")
    assert shown(data=OWN.model_dump()) == OWN


@pytest.mark.parametrize("std", [(0.1, 0.2), (0.1, 0.2, 0.0), (0.1, 0.2, float("inf"))])
def test_what_is_no_deviation_is_refused(std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"data\.std"):
        recipe(data={"std": std})


def test_a_run_says_what_its_network_is_shown_and_keeps_it(
    tmp_path: Path, rocks: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = recipe("classify", model={"pretrained": str(weights)}, train={"keep_checkpoints": 9})
    run = RunFolder(tmp_path / "run")
    train(chosen, rocks, run.path, ALONE)
    line = f"test_resnet is shown images as its weights were trained: {HALF}, at 32 px (usual: 160 px)\n"
    assert capsys.readouterr().out.count(line) == 1
    assert run.open()[0].data.preprocessing == HALF
    said = json.loads((run.path / "config.json").read_text())["preprocessing"]
    shown = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    assert (
        said == {"resize": 40, "crop": 32, "fit": "squeeze", "max_pixels": 100_000_000, "on_bad_image": "skip"} | shown
    )
    assert load_model(run.path)[1].preprocessing.preprocessing == HALF
    assert "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bilinear" in (run.path / "README.md").read_text()

    # It goes on as it began, though the recipe leaves it open; and is not continued otherwise.
    expected = losses(run.path)
    (run.checkpoints / "step-00000006.safetensors").unlink()
    train(chosen, rocks, run.path, ALONE)
    assert losses(run.path) == expected and run.open()[0].data.preprocessing == HALF
    other = recipe("classify", model={"pretrained": str(weights)}, data={"mean": IMAGENET.mean})
    with pytest.raises(UserError, match=r"of another recipe: data\.mean \(0\.5, 0\.5, 0\.5\) -> \(0\.485, "):
        train(other, rocks, run.path, ALONE)


def test_pixels_of_a_run_are_its_own(tmp_path: Path, rocks: Path) -> None:
    """Training sees them: other means give other losses; ImageNet's, written out, give those of a recipe of before."""
    runs = {"before": {}, "imagenet": IMAGENET.model_dump(), "half": HALF.model_dump()}
    for name, data in runs.items():
        train(recipe("classify", data=data, train={"epochs": 1}), rocks, tmp_path / name, ALONE)
    assert losses(tmp_path / "before") == losses(tmp_path / "imagenet") != losses(tmp_path / "half")


def test_recipes_that_share_batches_but_want_other_pixels_are_refused(
    tmp_path: Path, rocks: Path, weights: Path
) -> None:
    recipes = {
        tmp_path / "scratch": recipe("classify"),
        tmp_path / "pretrained": recipe("classify", model={"pretrained": str(weights)}),
    }
    with pytest.raises(UserError, match="data: differs between recipes that share batches"):
        train_together(recipes, rocks, ALONE)


# --- the backbone of another run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FPCN for five classes that was shown images in its own way; with its checkpoint beside it."""
    chosen = recipe("contrast", model={"norm": "batch"}, data=OWN.model_dump())
    folder = tmp_path_factory.mktemp("origin") / "run"
    make_teacher(folder, classes="abcde", seed=4, data=OWN.model_dump())
    tensors = load_model(folder)[0].state_dict()
    state = TrainingState(7, {f"model.{name}": value for name, value in tensors.items()})
    averaged = TrainingState(
        7,
        {name: torch.zeros_like(value) for name, value in state.weights.items()},
        ema={f"module.{name}": value for name, value in tensors.items()},
    )
    (folder / "checkpoints").mkdir()
    said = CheckpointInfo(7, chosen.model_dump(), "hash", tuple("abcde"))
    write_checkpoint(folder / "checkpoints" / BEST, averaged, said)
    write_checkpoint(folder / "checkpoints/step-00000007.safetensors", state, said)
    return folder


@pytest.mark.parametrize(
    "path", [".", "model.safetensors", f"checkpoints/{BEST}", "checkpoints/step-00000007.safetensors"]
)
def test_a_backbone_comes_with_how_it_was_shown_images(origin: Path, path: str) -> None:
    pretrained = str(origin / path)
    settled = name_preprocessing(recipe("classify", model={"pretrained": pretrained}))
    assert settled.data.preprocessing == OWN
    expected = load_model(origin)[0].backbone.state_dict()
    found = Classifier("test_resnet", 3, pretrained=pretrained).backbone.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert list(describe_weights(settled, CLASSES)) == [
        f"backbone test_resnet from {pretrained}, trained for 5 classes; what follows it is new, for 3 classes",
        f"test_resnet is shown images as its weights were trained: {OWN}, at 32 px (usual: 160 px)",
    ]


def test_a_run_starts_from_another(tmp_path: Path, rocks: Path, origin: Path, capsys) -> None:
    chosen = recipe("classify", model={"norm": "batch", "pretrained": str(origin)}, train={"epochs": 1})
    train(chosen, rocks, tmp_path / "run", ALONE)
    assert capsys.readouterr().out.count("what follows it is new, for 3 classes") == 1
    assert RunFolder(tmp_path / "run").open()[0].data.preprocessing == OWN
    model, info = load_model(tmp_path / "run")
    assert info.preprocessing.preprocessing == OWN and model.classifier.out_features == 3


def refused(**model) -> UserError:
    with pytest.raises(UserError) as caught:
        name_preprocessing(recipe("classify", model=model))
    assert caught.value.field == "model.pretrained"
    return caught.value


@pytest.mark.parametrize("path", [".", f"checkpoints/{BEST}"])
def test_another_backbone_is_refused_by_name(origin: Path, path: str) -> None:
    error = refused(backbone="resnet18", pretrained=str(origin / path))
    assert error.reason == "its backbone is test_resnet, not resnet18"
    assert error.hint == "set model.backbone to test_resnet, or give a run with resnet18"


def test_folders_without_a_model_are_refused(tmp_path: Path, origin: Path) -> None:
    assert refused(pretrained=str(tmp_path)).reason == "holds no config.json"
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    (tmp_path / "model.safetensors").write_bytes((origin / "model.safetensors").read_bytes())
    assert refused(pretrained=str(tmp_path)).reason == "was not written by fpcn_dist"
    # A file beside a description that is not ours is a weights file as any other.
    assert shown(model={"pretrained": str(tmp_path / "model.safetensors")}) == HALF


# --- students see what their teacher sees -----------------------------------------------------------------------------


def test_a_student_is_shown_its_teachers_images_unless_it_asks_for_others(
    tmp_path: Path, rocks: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher(tmp_path / "teacher", data=OWN.model_dump())
    model, distill = {"pretrained": str(weights)}, {"teacher": str(teacher)}
    other = recipe(model=model, distill=distill, data={"interpolation": "bilinear"})
    with pytest.raises(UserError, match=r"data\.interpolation bilinear: the teacher was trained with bicubic"):
        train(other, rocks, tmp_path / "other", ALONE)

    train(recipe(model=model, distill=distill, train={"epochs": 1}), rocks, tmp_path / "student", ALONE)
    line = f"test_resnet is shown images otherwise than its weights were trained: {OWN}, not {HALF}"
    assert line in capsys.readouterr().out
    bank = json.loads((tmp_path / "student/bank/bank.json").read_text())
    assert (bank["mean"], bank["std"], bank["interpolation"]) == (list(OWN.mean), list(OWN.std), "bicubic")
    student = RunFolder(tmp_path / "student").open()[0]
    assert student.data.preprocessing == OWN
    assert load_model(tmp_path / "student")[1].preprocessing.preprocessing == OWN
