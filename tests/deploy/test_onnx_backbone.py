"""Frozen backbones through onnxruntime: what eager PyTorch computes, or eager PyTorch itself with the reason."""

from __future__ import annotations

import builtins
import math

import onnx
import pytest
import torch
from torch import Tensor, nn

from fpcn_dist.deploy import onnx_backbone, onnx_graph, onnx_predict
from fpcn_dist.deploy.onnx_backbone import WORTH_EXPORTING, FrozenBackbone, frozen_features, with_frozen_backbone
from fpcn_dist.models import FPCN, Backbone, BilinearCNN, Classifier, build_backbone
from fpcn_dist.recipe.schema import ModelConfig
from tests.helpers.distilling import CPU

IMAGES = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """With BatchNorm statistics that are not those of its beginning, in training mode."""
    torch.manual_seed(0)
    net = build_backbone("test_resnet")
    with torch.no_grad():
        for _ in range(3):
            net(3 * torch.randn(16, 3, 64, 64) + 1)
    return net


def eager(backbone: nn.Module, images: Tensor) -> Tensor:
    training = backbone.training
    with torch.no_grad():
        features = backbone.eval()(images)
    backbone.train(training)
    return features


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture(scope="module")
def frozen(backbone) -> FrozenBackbone:
    """One that has seen :data:`IMAGES`."""
    features = frozen_features(backbone, CPU, threads=1)
    assert isinstance(features, FrozenBackbone)
    with torch.inference_mode():  # as evaluation calls it
        assert_close(features(IMAGES), eager(backbone, IMAGES))
    return features


def test_features_are_those_of_eager_pytorch_for_any_number_of_images(backbone, frozen, monkeypatch):
    monkeypatch.setattr(FrozenBackbone, "eager", None)
    for images in (IMAGES[:1], IMAGES[1:4], IMAGES.flip(0)):
        features = frozen(images)
        assert_close(features, eager(backbone, images))
        assert not features.requires_grad
    assert torch.equal(frozen(IMAGES.to(memory_format=torch.channels_last)), frozen(IMAGES))
    assert all(module.training for module in backbone.modules())


def test_other_sizes_and_autocast_are_computed_by_eager_pytorch(backbone, frozen):
    assert torch.equal(frozen(IMAGES[..., :32]), eager(backbone, IMAGES[..., :32]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(IMAGES), eager(backbone, IMAGES))


def test_few_images_are_not_worth_an_export(backbone):
    features = frozen_features(backbone, CPU, images=WORTH_EXPORTING - 1)
    assert torch.equal(features(IMAGES), eager(backbone, IMAGES))
    assert isinstance(frozen_features(backbone, CPU, images=WORTH_EXPORTING), FrozenBackbone)


class Another(Backbone):
    """Repeats the channels of the images as ``way`` says."""

    def __init__(self, way: str) -> None:
        super().__init__(nn.Conv2d(3, 3, 1), 6, "batch")
        self.way = way

    def forward(self, images: Tensor) -> Tensor:
        features = self.net(images).repeat(1, 2, 1, 1)
        if self.way == "branching":
            return features if images.sum() > 0 else features.neg()
        return features * len(images)


@pytest.mark.parametrize(
    ("way", "reason"),
    [("branching", "PyTorch cannot export it to ONNX"), ("counting", "its code fixes the number of images")],
)
def test_a_network_that_cannot_be_exported_is_computed_by_eager_pytorch(way, reason, capsys):
    net = Another(way)
    features = FrozenBackbone(net)
    for images in (IMAGES, -IMAGES, IMAGES[:3]):
        assert torch.equal(features(images), eager(net, images))
    (line,) = capsys.readouterr().out.splitlines()
    assert "eager PyTorch computes it, as" in line and reason in line


class Session:
    """In place of onnxruntime's: computes eager PyTorch's features, and adds to the last of them."""

    def __init__(self, features: Tensor, excess: float) -> None:
        self.features = features.clone()
        self.features[-1, -1, -1, -1] += excess * features.abs().max()

    def get_inputs(self):
        return [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, None)]

    def run(self, *_):
        return [self.features.numpy()]


@pytest.mark.parametrize("excess", [0.5e-4, 2e-4, math.nan])
def test_a_session_that_computes_something_else_is_not_used(excess, backbone, monkeypatch, capsys):
    expected = eager(backbone, IMAGES)
    session = Session(expected, excess)
    monkeypatch.setattr(onnx_predict, "open_session", lambda *_, **options: session)
    monkeypatch.setattr(onnx_graph, "export_graph", lambda *_: onnx.ModelProto())
    found, shown = FrozenBackbone(backbone)(IMAGES), capsys.readouterr().out
    if excess < 1e-4:
        assert torch.equal(found, session.features) and "5.0e-05 of the largest feature from PyTorch" in shown
    else:
        assert torch.equal(found, expected) and f"onnxruntime differs by {excess:.1e} of the largest feature" in shown


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript"])
def test_without_the_packages_of_the_export_eager_pytorch_computes(missing, backbone, monkeypatch, capsys):
    importing = builtins.__import__

    def refuse(name, *rest):
        if name == missing or (name.endswith("onnx_graph") and missing == "onnxscript"):
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert torch.equal(FrozenBackbone(backbone)(IMAGES), eager(backbone, IMAGES))
    assert f"eager PyTorch computes it, as {missing} is not installed" in capsys.readouterr().out


def test_a_model_pools_as_with_its_own_backbone(monkeypatch):
    monkeypatch.setattr(onnx_backbone, "WORTH_EXPORTING", 5)
    torch.manual_seed(3)
    model = FPCN("test_resnet", 4, region="largest", hidden=8).eval()
    with torch.inference_mode():
        expected = model.pool(IMAGES)
        frozen = with_frozen_backbone(model, images=5)
        assert isinstance(frozen.backbone, FrozenBackbone)
        found = frozen.pool(IMAGES)
    assert torch.equal(found.mask, expected.mask)
    assert_close(found.pooled, expected.pooled)


def test_a_model_stays_as_it_is_where_nothing_is_gained_or_more_than_features_is_read(monkeypatch):
    few = onnx_backbone.WORTH_EXPORTING - 1
    companion = FPCN("resnet18", 4, region="largest", companion=True)
    compared = BilinearCNN(ModelConfig(backbone="test_resnet", pretrained=False), 4)
    for model, images in ((Classifier("test_resnet", 4), few), (companion, 10**6), (compared, 10**6)):
        own = model.backbone
        assert with_frozen_backbone(model, images) is model and model.backbone is own
