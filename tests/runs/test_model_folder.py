"""A model survives the way through its export folder, and a folder that is not one is explained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from fpcn_dist import __version__
from fpcn_dist.models import build_model
from fpcn_dist.recipe.preprocessing import IMAGENET
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.evaluation import AreaScore, ClassScore, Evaluation
from fpcn_dist.runs.model_folder import load_model, save_model, write_card
from fpcn_dist.runtime.errors import UserError

CLASSES = ("basalt", "dolo|mite: <b>", "marble")


def _recipe(task: str = "contrast", **model: object) -> Recipe:
    small = {"backbone": "test_resnet", "pretrained": False, "hidden": 16} | model
    return Recipe(task=task, model=ModelConfig(**small), data=DataConfig(resize=72, crop=64))


def _evaluation() -> Evaluation:
    return Evaluation(
        split="val",
        checkpoint="best",
        step=12,
        images=10,
        loss=0.5,
        accuracy=0.8,
        per_class=(
            ClassScore(CLASSES[0], 1.0, 0.5, 2 / 3, 4),
            ClassScore(CLASSES[1], None, 0.0, 0.0, 1),
            ClassScore(CLASSES[2], 0.7, 1.0, 0.82, 5),
        ),
        confusion=((2, 0, 2), (0, 0, 1), (0, 0, 5)),
        area_quartiles=tuple(AreaScore(area, 0, None) for area in ("0-25%", "25-50%", "50-75%", "75-100%")),
    )


def _trained(recipe: Recipe, seed: int = 0) -> nn.Module:
    """A network whose weights and running statistics are nobody's defaults."""
    torch.manual_seed(seed)
    model = build_model(recipe.model, len(CLASSES), task=recipe.task)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand_like(tensor))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    save_model(folder, _trained(_recipe()), _recipe(), CLASSES)
    return folder


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export for the test to damage."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


@pytest.mark.parametrize(
    "recipe",
    [
        _recipe(),
        _recipe("classify"),
        _recipe(backbone="resnet18", norm="group", region="largest", companion=True, theta=0.1),
        _recipe(norm="sync_batch"),
        _recipe(norm="frozen_batch", activation="identity", inference="plain"),
    ],
    ids=["fpcn", "classifier", "group-largest", "sync", "frozen"],
)
def test_the_loaded_model_computes_the_same(tmp_path: Path, recipe: Recipe) -> None:
    model = _trained(recipe).to(memory_format=torch.channels_last).train()
    save_model(tmp_path, model, recipe, CLASSES)
    loaded, info = load_model(tmp_path)
    assert not any(module.training for module in loaded.modules())
    assert (info.classes, info.task, info.model) == (CLASSES, recipe.task, recipe.model)
    assert (info.preprocessing.resize, info.preprocessing.crop) == (72, 64)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model.eval()(images), rtol=1e-5, atol=1e-5)


def test_config_has_the_hugging_face_layout(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["FPCN"]
    assert config["id2label"] == {"0": CLASSES[0], "1": CLASSES[1], "2": CLASSES[2]}
    assert config["label2id"] == {name: index for index, name in enumerate(CLASSES)}
    assert config["model"] == _recipe().model.model_dump()
    assert config["fpcn_dist_version"] == __version__
    assert config["preprocessing"] == {
        "resize": 72,
        "crop": 64,
        "fit": "squeeze",
        "max_pixels": 100_000_000,
        "on_bad_image": "skip",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
    }
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_model_of_before_others_were_known_was_shown_images_as_for_imagenet(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text()) | {"format": 1}
    del config["preprocessing"]["interpolation"]
    (damaged / "config.json").write_text(json.dumps(config))
    assert load_model(damaged)[1].preprocessing.preprocessing == IMAGENET


def test_the_fit_of_images_is_kept_and_is_squeeze_in_older_folders(tmp_path: Path) -> None:
    recipe = _recipe().changed(**{"data.fit": "short_side"})
    save_model(tmp_path, _trained(recipe), recipe, CLASSES)
    assert load_model(tmp_path)[1].preprocessing.fit == "short_side"
    assert "a short side of 72 pixels" in (tmp_path / "README.md").read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["preprocessing"]["fit"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path)[1].preprocessing.fit == "squeeze"


def test_loading_asks_no_network_for_pretrained_weights(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["model"]["pretrained"] = "/no/such/weights.pth"
    (damaged / "config.json").write_text(json.dumps(config))
    _, info = load_model(damaged)
    assert info.model.pretrained == "/no/such/weights.pth"


@pytest.mark.parametrize("evaluation", [None, _evaluation()], ids=["unevaluated", "evaluated"])
def test_the_card_is_valid_whatever_the_names(tmp_path: Path, evaluation: Evaluation | None) -> None:
    recipe = _recipe().changed(name='rocks: "7" #1')
    write_card(tmp_path, recipe, CLASSES, evaluation)
    _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["library_name"] == "fpcn_dist" and matter["metrics"] == ["accuracy"]
    assert "fpcn" in matter["tags"] and "test_resnet" in matter["tags"]
    assert "<b>" not in body and "resized to 72 x 72" in body and "64 x 64" in body
    if evaluation is None:
        assert "model-index" not in matter and "Not evaluated yet." in body
    else:
        assert matter["model-index"][0]["name"] == recipe.name
        assert matter["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.8}]
        assert "Accuracy **80.0 %** on 10 val images" in body
        assert "| basalt | 1.000 | 0.500 | 0.667 | 4 |\n" in body
        assert "| dolo\\|mite: \\<b\\> | n/a | 0.000 | 0.000 | 1 |\n" in body


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(UserError, match=f"holds no {name}"):
        load_model(damaged)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "was not written by fpcn_dist"),
        ('{"architectures": ["BertModel"], "hidden_size": 768}', "was not written by fpcn_dist"),
        ('{"fpcn_dist_version": "9.0", "format": 3}', r"has format 3 \(fpcn_dist 9.0\).*install fpcn_dist 9.0"),
        ('{"fpcn_dist_version": "0.1.0", "format": 1}', "is damaged"),
    ],
)
def test_a_foreign_config_is_refused(damaged: Path, text: str, message: str) -> None:
    (damaged / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_model(damaged)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "hidden"), "wide"),
        (("model", "unknown_field"), 1),
        (("id2label",), {"0": "a", "2": "b"}),
        (("preprocessing", "mean"), [0.5, 0.5]),
        (("preprocessing", "std"), [0.5, 0.5, 0.0]),
        (("preprocessing", "interpolation"), "lanczos"),
        (("preprocessing", "crop"), 100),
        (("preprocessing", "fit"), "stretch"),
        (("task",), "segment"),
        (("model",), None),
    ],
)
def test_a_damaged_config_is_refused(damaged: Path, keys: tuple[str, ...], value: object) -> None:
    config = json.loads((damaged / "config.json").read_text())
    section = config
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: is damaged \(.+\); export the model again"):
        load_model(damaged)


def test_weights_of_another_network_are_refused_by_name_and_shape(damaged: Path) -> None:
    state = load_file(damaged / "model.safetensors")
    state["classifier.weight"] = torch.zeros(5, 96)
    state["stranger"] = state.pop("fuse_in.bias")
    save_file(state, damaged / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(damaged)
    for detail in (
        "classifier.weight has shape (5, 96), not (3, 96)",
        "fuse_in.bias is missing",
        "stranger is unknown",
    ):
        assert detail in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: b"text" * 100])
def test_damaged_weights_are_refused(damaged: Path, damage) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"model\.safetensors: is not a safetensors file"):
        load_model(damaged)
