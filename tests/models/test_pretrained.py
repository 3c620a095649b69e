"""Pretrained weights from files, caches and hubs that are out of reach."""

from __future__ import annotations

import functools
import pickle
import socket
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor

from fpcn_dist.models import FPCN, Classifier, build_backbone
from fpcn_dist.models.weights import _reach, torchvision_weights
from fpcn_dist.runtime.errors import UserError


@pytest.fixture(scope="module")
def resnet18() -> dict[str, Tensor]:
    torch.manual_seed(42)
    return torchvision.models.resnet18().state_dict()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network (a proxy that nobody listens at) and empty caches in the folder returned."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def assert_loaded(module: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    state = module.state_dict()
    assert len(state) > 20
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pth", "safetensors", "wrapped", "without counters", "without classifier"])
def test_resnet_weights_come_back_from_a_file(form: str, resnet18: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        safetensors.torch.save_file(resnet18, path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "state_dict": resnet18}, path)
    else:
        left_out = {"without counters": "num_batches_tracked", "without classifier": "fc."}.get(form, "nothing")
        torch.save({key: value for key, value in resnet18.items() if left_out not in key}, path)
    assert_loaded(build_backbone("resnet18", pretrained=str(path)).net, resnet18)


@pytest.mark.parametrize("norm", ["sync_batch", "frozen_batch"])
def test_every_batch_norm_takes_published_weights(norm: str, resnet18: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(resnet18, tmp_path / "weights.pth")
    backbone = build_backbone("resnet18", pretrained=str(tmp_path / "weights.pth"), norm=norm)
    assert_loaded(backbone.net, resnet18)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "mobilenetv3_small_100", "convnext_atto"])
def test_timm_weights_come_back_from_a_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(42)
    whole = timm.create_model(name).state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    assert_loaded(build_backbone(name, pretrained=str(tmp_path / "weights.pth")).net, whole)


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x1_5", "mobilenet_v3_small", "mnasnet0_5"])
def test_torchvision_weights_come_back_from_a_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(42)
    whole = torchvision.models.get_model(name).state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    assert_loaded(build_backbone(name, pretrained=str(tmp_path / "weights.pth")).net, whole)


def test_mobilenet_v1_takes_timms_weights(tmp_path: Path) -> None:
    torch.manual_seed(42)
    whole = timm.create_model("mobilenetv1_100").state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    assert_loaded(build_backbone("mobilenet_v1", pretrained=str(tmp_path / "weights.pth")).net, whole)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "shufflenet_v2_x1_5"])
def test_the_backbone_of_a_trained_model_starts_another(name: str, tmp_path: Path) -> None:
    trained = FPCN(name, 5, hidden=8)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "model.safetensors")
    model = Classifier(name, 3, pretrained=str(tmp_path / "model.safetensors"))
    assert_loaded(model.backbone, trained.backbone.state_dict())


# --- files of transformers ----------------------------------------------------------------------------------------


def saved(path: Path, weights: dict[str, Tensor]) -> str:
    torch.save(weights, path / "weights.pth")
    return str(path / "weights.pth")


def test_position_embeddings_of_another_image_size_are_resampled(tmp_path: Path) -> None:
    torch.manual_seed(42)
    whole = timm.create_model("test_vit", img_size=96).state_dict()
    net = build_backbone("test_vit", pretrained=saved(tmp_path, whole)).net.state_dict()
    expected = timm.layers.resample_abs_pos_embed(whole["pos_embed"], [10, 10], num_prefix_tokens=1)
    torch.testing.assert_close(net.pop("pos_embed"), expected)
    assert all(torch.equal(value, whole[key]) for key, value in net.items())


def test_patches_of_another_size_are_another_network(tmp_path: Path) -> None:
    path = saved(tmp_path, timm.create_model("test_vit", patch_size=8).state_dict())
    with pytest.raises(UserError, match=r"weights of another network: .*reshaped \(such as patch_embed.proj.weight"):
        build_backbone("test_vit", pretrained=path)


def test_a_norm_of_the_mean_becomes_one_of_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in EVA-02 and BEiT: their published weights have it after the pooling, which is ours."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, global_pool="avg"))
    whole = timm.create_model("test_vit").state_dict()
    whole["fc_norm.weight"] = torch.linspace(1, 2, 64)
    net = build_backbone("test_vit", pretrained=saved(tmp_path, whole)).net.state_dict()
    assert torch.equal(net.pop("norm.weight"), whole["fc_norm.weight"])
    assert torch.equal(net.pop("norm.bias"), whole["fc_norm.bias"])
    assert net and all(torch.equal(value, whole[key]) for key, value in net.items())


def test_an_attention_pool_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, global_pool="map"))
    whole = timm.create_model("test_vit").state_dict()
    assert any(key.startswith("attn_pool.") for key in whole)
    backbone = build_backbone("test_vit", pretrained=saved(tmp_path, whole))
    assert_loaded(backbone.net, whole)
    assert not any("attn_pool" in key for key in backbone.state_dict())


def test_the_backbone_of_a_trained_transformer_starts_another(tmp_path: Path) -> None:
    trained = FPCN("test_vit", 5, hidden=8)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "model.safetensors")
    model = Classifier("test_vit", 3, pretrained=str(tmp_path / "model.safetensors"))
    assert_loaded(model.backbone, trained.backbone.state_dict())


def refused(name: str, path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        build_backbone(name, pretrained=str(path))
    assert caught.value.field == "model.pretrained"
    assert str(path) in str(caught.value)
    return caught.value


def test_a_missing_file_is_named_with_the_ways_out(tmp_path: Path) -> None:
    error = refused("resnet18", tmp_path / "nowhere.pth")
    assert error.reason == "there is no such file"
    assert "false to train from scratch" in error.hint


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, I am a text", b"PK\x03\x04 cut short"])
def test_a_file_that_holds_no_weights_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    assert refused("resnet18", path).reason == "this is not a readable weights file"


def test_a_file_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Touch(), protocol=2))
    refused("resnet18", tmp_path / "weights.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"epoch": 3}])
def test_a_file_of_something_else_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert refused("resnet18", tmp_path / "weights.pth").reason == "this file holds no state dict of tensors"


@pytest.mark.parametrize(
    ("backbone", "findings"),
    [
        ("resnet34", ["missing (such as layer1.2.bn1.bias)"]),
        ("resnet50", ["missing (such as layer1.0.bn3.bias)", "reshaped (such as layer1.0.conv1.weight)"]),
        ("mobilenetv2_100", ["missing (such as blocks.0.0.bn1.bias)", "unexpected (such as conv1.weight)"]),
    ],
)
def test_weights_of_another_network_are_refused_with_examples(
    backbone: str, findings: list[str], resnet18: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(resnet18, tmp_path / "weights.pth")
    error = refused(backbone, tmp_path / "weights.pth")
    assert "another network" in error.reason
    assert all(finding in error.reason for finding in findings), error.reason


# --- hubs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "mobilenet_v1", "mobilenet_v2"])
def test_without_a_network_the_error_names_the_address_and_leaves_nothing(name: str, offline: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_backbone(name, pretrained=True)
    assert caught.value.field == "model.pretrained"
    assert "could not be fetched from https://" in caught.value.reason
    assert "give the path of a .pth or .safetensors file, or false to train from scratch" in caught.value.hint
    assert list(offline.iterdir()) == []


def test_a_server_that_accepts_and_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpcn_dist.models.weights.NETWORK_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OSError, match="timed out"):
        _reach(f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth")


def test_cached_torchvision_weights_need_no_network(offline: Path, resnet18: dict[str, Tensor]) -> None:
    cache = offline / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(resnet18, cache / "resnet18-f37072fd.pth")
    assert_loaded(build_backbone("resnet18", pretrained=True).net, resnet18)


def test_cached_weights_of_a_student_need_no_network(offline: Path) -> None:
    cache = offline / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.manual_seed(42)
    whole = torchvision.models.shufflenet_v2_x1_5().state_dict()
    url = torchvision.models.ShuffleNet_V2_X1_5_Weights.IMAGENET1K_V1.url
    torch.save(whole, cache / url.rpartition("/")[2])
    assert_loaded(build_backbone("shufflenet_v2_x1_5", pretrained=True).net, whole)


def test_torchvision_weights_for_another_image_size_are_none() -> None:
    with pytest.raises(UserError, match=r"model.pretrained True: there are no published weights for vit_h_14; give"):
        torchvision_weights("vit_h_14")


def test_cached_timm_weights_need_no_network(offline: Path) -> None:
    torch.manual_seed(42)
    whole = timm.create_model("mobilenetv2_100").state_dict()
    repository = offline / "hub" / "models--timm--mobilenetv2_100.ra_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    (repository / "snapshots" / "0123abcd").mkdir(parents=True)
    safetensors.torch.save_file(whole, repository / "snapshots" / "0123abcd" / "model.safetensors")
    assert_loaded(build_backbone("mobilenetv2_100", pretrained=True).net, whole)


def test_a_network_that_nobody_published_weights_for_is_refused(offline: Path) -> None:
    with pytest.raises(UserError, match=r"model.pretrained True: there are no published weights for darknet17"):
        build_backbone("darknet17", pretrained=True)
