"""An exported ONNX model computes what PyTorch computes, on pixels that are cut alike, or is not written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fpcn_kernels import masked_pool
from rich.console import Console
from torch import nn

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.deploy import onnx_export, onnx_graph, onnx_predict
from fpcn_dist.deploy.onnx_export import export_onnx
from fpcn_dist.deploy.onnx_graph import ExportableModel, to_onnx
from fpcn_dist.deploy.predict import predict
from fpcn_dist.models import Classifier, build_model
from fpcn_dist.recipe.preprocessing import Preprocessing
from fpcn_dist.recipe.reading import dump_recipe
from fpcn_dist.recipe.schema import ContrastConfig, DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.model_folder import ModelInfo, export_safetensors, load_model, save_model
from fpcn_dist.runtime.errors import UserError
from tests.helpers.launching import ROOT

CLASSES = ("basalt", "dolomite", "marble")
DATA = DataConfig(resize=104, crop=96, images_per_class=4, threads=1)


def _recipe(task: str = "contrast", **model: object) -> Recipe:
    small = {"backbone": "test_resnet", "pretrained": False, "hidden": 16} | model
    pairs = {"pairs": "hardest"} if model.get("head") == "gated" else {}
    return Recipe(task=task, model=ModelConfig(**small), data=DATA, contrast=ContrastConfig(**pairs))


def _model(recipe: Recipe) -> Classifier:
    """A network whose weights and running statistics are nobody's defaults, and whose logits differ between images."""
    torch.manual_seed(3)
    model = build_model(recipe.model, len(CLASSES), task=recipe.task)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand_like(tensor))
        model.classifier.weight.mul_(20)
    return model.eval()


def _save_run(folder: Path, recipe: Recipe, manifest: Manifest) -> Path:
    run = RunFolder(folder)
    folder.mkdir()
    save_model(folder, _model(recipe), recipe, CLASSES)
    run.recipe.write_text(dump_recipe(recipe))
    manifest.save(run.manifest)
    return folder


def _export(*args, **options) -> tuple[list[Path], str]:
    text = io.StringIO()
    return export_onnx(*args, console=Console(file=text, width=200), **options), text.getvalue()


@pytest.fixture(scope="module")
def manifest(rocks: Path) -> Manifest:
    return build_manifest(rocks, DATA, seed=0)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    return _save_run(tmp_path_factory.mktemp("onnx") / "run", _recipe(theta=0.2), manifest)


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with both models, and what was printed."""
    folder = tmp_path_factory.mktemp("exported")
    files, text = _export(run_dir, int8=True, output=folder)
    assert files == [folder / "model.onnx", folder / "model-int8.onnx"]
    return folder, text


@pytest.fixture
def quick(exported: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """PyTorch's exporter takes seconds: the graph that it made of the same model once stands in for it."""
    monkeypatch.setattr(onnx_export, "to_onnx", lambda exportable, info: (onnx.load(exported[0] / "model.onnx"), []))
    return monkeypatch


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with a model, but no run."""
    save_model(tmp_path, _model(_recipe()), _recipe(), CLASSES)
    return tmp_path


def test_an_export_shows_images_as_the_model_was_trained(
    manifest: Manifest, exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the probabilities of a photograph, which are those of PyTorch, and others than of ImageNet's pixels."""

    def described(exportable: ExportableModel, info: ModelInfo) -> tuple[onnx.ModelProto, list[str]]:
        proto = onnx.load(exported[0] / "model.onnx")
        onnx_graph.describe(proto, info)
        return proto, []

    monkeypatch.setattr(onnx_export, "to_onnx", described)
    own = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), interpolation="bicubic")
    run = _save_run(tmp_path / "run", _recipe(theta=0.2).with_preprocessing(own), manifest)
    _export(run)
    model = onnx_predict.open_model(run / "model.onnx")
    assert (model.mean, model.std, model.interpolation) == (own.mean, own.std, own.interpolation)
    files = [Path(manifest.blob(index).path) for index in range(0, len(manifest.images), 9)]
    expected = [one.probabilities for one in predict(run, files, tmp_path / "out")]
    found, _ = onnx_predict.classify(model, files)
    others, _ = onnx_predict.classify(onnx_predict.open_model(exported[0] / "model.onnx"), files)
    ours, theirs, imagenet = (
        np.array([[row[name] for name in CLASSES] for row in rows])
        for rows in ([one.probabilities for one in found], expected, [one.probabilities for one in others])
    )
    assert np.abs(ours - theirs).max() < 0.02 < np.abs(imagenet - theirs).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        _recipe(theta=0.2),
        _recipe("classify"),
        _recipe(region="none", norm="sync_batch"),
        _recipe(backbone="resnet18", norm="group", head="gated", area_scale=False, activation="identity"),
        _recipe(backbone="test_vit"),
    ],
    ids=["fpcn", "classifier", "whole-map", "gated-group", "tokens"],
)
def test_any_batch_gives_the_logits_of_pytorch(recipe: Recipe) -> None:
    model = _model(recipe)
    proto, _ = to_onnx(ExportableModel(model), ModelInfo(CLASSES, DATA, recipe.model, recipe.task))
    onnx.checker.check_model(proto, full_check=True)
    exported = onnx_predict.describe(onnx_predict.open_session(proto.SerializeToString()), Path("model.onnx"))
    for size in (1, 2, 5):
        images = torch.randn(size, 3, 96, 96, generator=torch.Generator().manual_seed(size))
        with torch.inference_mode():
            pool = model.pool(images)
            expected = model.logits(pool.pooled)
        logits, mask = exported.run(images.numpy())
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(mask), pool.mask, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3, 7, 96])
def test_the_region_is_that_of_the_kernels(channels: int) -> None:
    exportable = ExportableModel(_model(_recipe()))
    features = torch.randn(4, channels, 5, 7, generator=torch.Generator().manual_seed(channels))
    features[1] = torch.rand(channels, 1, 1)  # constant: rounding must leave no cell below the mean
    inside = exportable.excess(features) >= 0
    assert inside[1].all() and not inside[0].all()
    assert torch.equal(inside, masked_pool(features).mask == 1)


@pytest.mark.slow
def test_what_is_written_and_printed(exported: tuple[Path, str], rocks: Path) -> None:
    folder, text = exported
    assert sorted(path.name for path in folder.iterdir()) == ["model-int8.onnx", "model.onnx"]
    assert "Parity on 6 val images: logits differ by at most" in text and "grey levels" in text
    assert "Calibrated on 60 train images." in text and "accuracy on 6 test images" in text
    for name in ("model.onnx", "model-int8.onnx"):
        path = folder / name
        model = onnx.load(path)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(metadata["classes"]) == list(CLASSES)
        assert (metadata["resize"], metadata["crop"], metadata["task"]) == ("104", "96", "contrast")
        assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
        assert json.loads(metadata["std"]) == [0.229, 0.224, 0.225]
        assert metadata["interpolation"] == "bilinear"
        assert metadata["format"] == "2" and metadata["fpcn_dist_version"]
        (line,) = [line for line in text.splitlines() if line.startswith("│ " + name + " ")]
        assert f"{path.stat().st_size / 1e6:.1f} MB" in line and line.count("%") == 1
        content = path.read_bytes()
        assert str(ROOT).encode() not in content and str(rocks).encode() not in content


def test_only_the_backbone_is_quantised_and_the_logits_survive(exported: tuple[Path, str], rocks: Path) -> None:
    folder, _ = exported
    fp32, int8 = (onnx_predict.open_model(folder / name) for name in ("model.onnx", "model-int8.onnx"))
    assert (folder / "model-int8.onnx").stat().st_size < 0.45 * (folder / "model.onnx").stat().st_size
    graph = onnx.load(folder / "model-int8.onnx").graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    for node in graph.node:
        quantised = all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2])
        assert node.op_type not in ("Conv", "Gemm") or quantised == (node.op_type == "Conv"), node.name
    pixels = [
        onnx_predict.read_image(blob, 104, 96, "squeeze", "bilinear")
        for blob in Blob.of_files(sorted(rocks.rglob("*.jpg"))[::6])
    ]
    expected, _ = fp32.run(fp32.normalise(pixels))
    found, _ = int8.run(int8.normalise(pixels))
    error = found - expected
    assert np.abs(error).max() > 0
    assert error.std() < 0.3 * (expected - expected.mean(axis=0)).std()


def test_int8_is_calibrated_on_training_images(
    run_dir: Path, manifest: Manifest, tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    shown: list[np.ndarray] = []

    def quantise(proto, info, head, images):
        shown.extend(images)
        return proto

    quick.setattr(onnx_export, "quantise", quantise)
    quick.setattr(onnx_export, "_CALIBRATION_IMAGES", 30)
    _, text = _export(run_dir, int8=True, output=tmp_path)
    assert "Calibrated on 30 train images." in text
    loader = EvalLoader.from_manifest(manifest, "train", DATA, rank=0, world_size=1, device=torch.device("cpu"))
    training = torch.cat([batch.images for batch in loader]).numpy()
    labels = manifest.labels[manifest.ids("train")]
    which = [next(i for i, one in enumerate(training) if np.array_equal(one, image)) for image in np.concatenate(shown)]
    assert len(set(which)) == 30 and {labels[i] for i in which} == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.classifier.weight.mul_(1.01), "disagree: logits differ by"),
        (lambda model: model.classifier.bias.fill_(float("nan")), "disagree: logits differ by nan"),
        (lambda model: model.classifier.weight.copy_(model.classifier.weight.roll(1, 0)), "images get another class"),
        (lambda model: next(model.backbone.parameters()).neg_(), "disagree about the region"),
    ],
    ids=["scaled", "nan", "class", "region"],
)
def test_a_model_that_computes_something_else_is_not_written(
    run_dir: Path, tmp_path: Path, quick: pytest.MonkeyPatch, change, message: str
) -> None:
    model, info = load_model(run_dir)
    with torch.no_grad():
        change(model)
    quick.setattr(onnx_export, "load_model", lambda folder: (model, info))
    with pytest.raises(UserError, match=message):
        _export(run_dir, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pixels_that_differ_are_an_error(run_dir: Path, tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    right = onnx_predict.read_image
    quick.setattr(onnx_predict, "read_image", lambda *args, **sizes: right(*args, **sizes)[::-1])
    with pytest.raises(UserError, match=r"image .*jpg: of JPEG with YCbCr, .* differ by \d+ grey levels; convert it"):
        _export(run_dir, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cell_that_rounding_decides_is_compared_over_the_same_region() -> None:
    exportable = ExportableModel(_model(_recipe()))
    features = torch.rand(2, 96, 2, 2)
    features[0] = torch.tensor([[1.0, 3.0], [2.0, 2.0 + 1e-6]])  # sums of 2, but for rounding, are the mean
    exportable.model.backbone.forward = lambda images: features
    mask = exportable.model.pool(features).mask
    logits, ties = onnx_export._reference(exportable, features, mask, Path("run"))
    assert ties == 0 and torch.equal(logits, exportable.model(features))
    flipped = mask.clone()
    flipped[0, 1] = 1 - flipped[0, 1]
    logits, ties = onnx_export._reference(exportable, features, flipped, Path("run"))
    assert ties == 2 and torch.equal(logits[1], exportable.model(features)[1])
    torch.testing.assert_close(logits[0], exportable.logits(features, flipped)[0])
    flipped[0, 0] = 1 - flipped[0, 0]
    with pytest.raises(UserError, match="about the region"):
        onnx_export._reference(exportable, features, flipped, Path("run"))


@pytest.mark.slow
def test_without_photographs_generated_images_show_the_parity(bare: Path) -> None:
    (path,), text = _export(bare)
    assert path == bare / "model.onnx" and path.is_file()
    assert "generated images take their place" in text and "Parity on 16 generated images" in text


def test_moved_photographs_are_found_with_data(
    manifest: Manifest, rocks: Path, tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    gone = Manifest(str(tmp_path / "gone"), manifest.classes, manifest.images, manifest.refused)
    run = _save_run(tmp_path / "run", _recipe(theta=0.2), gone)
    with pytest.raises(UserError, match=r"--data .*gone: the photographs .* are not there \(.*\.jpg is missing\)"):
        _export(run, int8=True)
    with pytest.raises(UserError, match=r"--data .*nowhere"):
        _export(run, data=tmp_path / "nowhere")
    assert not list(run.glob("*.onnx"))
    _, text = _export(run, data=rocks)
    assert "Parity on 6 val images" in text


def test_an_output_that_is_a_file_is_an_error(run_dir: Path, tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file"):
        _export(run_dir, output=tmp_path / "file" / "below")


def test_what_cannot_be_exported_is_explained(bare: Path) -> None:
    with pytest.raises(UserError, match=r"--int8: .* is no run folder"):
        _export(bare, int8=True)
    with pytest.raises(UserError, match=rf"--data {bare}: .* is no run folder"):
        _export(bare, data=bare)
    with pytest.raises(UserError, match=r"model.region largest: ONNX has no operator for connected regions; "):
        ExportableModel(_model(_recipe(region="largest")))
    compared = build_model(ModelConfig(backbone="resnet18", pretrained=False), 3, task="mmal_net")
    with pytest.raises(UserError, match=r"model MMALNet: its forward pass is not written in ONNX's operators; use"):
        ExportableModel(compared)


class Branching(nn.Module):
    def forward(self, images):
        return images.repeat(1, 32, 1, 1) if images.sum() > 0 else images.repeat(1, 32, 1, 1).neg()


class Counting(nn.Module):
    def forward(self, images):
        return images.repeat(1, 32, 1, 1) * len(images)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [(Branching(), "PyTorch cannot export it to ONNX"), (Counting(), "fixes the number of images of a batch")],
)
def test_a_backbone_that_cannot_be_exported_is_named(backbone: nn.Module, message: str) -> None:
    recipe = _recipe()
    model = _model(recipe)
    model.backbone = backbone
    with pytest.raises(UserError, match=f"model.backbone test_resnet: .*{message}"):
        to_onnx(ExportableModel(model), ModelInfo(CLASSES, DATA, recipe.model, recipe.task))


def _unknown_operator() -> onnx.ModelProto:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])], "other", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def test_an_onnx_model_that_onnxruntime_cannot_run_is_named(tmp_path: Path) -> None:
    info = ModelInfo(CLASSES, DATA, _recipe().model, "contrast")
    with pytest.raises(UserError, match=r"model.backbone test_resnet: onnxruntime cannot run it"):
        onnx_export._open(_unknown_operator(), info, tmp_path)


def test_safetensors_in_a_folder_of_their_own(bare: Path, tmp_path: Path) -> None:
    (bare / "more").write_text("of the run")
    files = export_safetensors(bare, tmp_path / "a" / "b")
    assert [path.name for path in files] == ["model.safetensors", "config.json", "README.md"]
    assert sorted((tmp_path / "a" / "b").iterdir()) == sorted(files)
    first, _ = load_model(bare)
    second, info = load_model(tmp_path / "a" / "b")
    assert info.classes == CLASSES
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert export_safetensors(bare) == [bare / path.name for path in files]
