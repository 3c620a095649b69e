"""Backbones by name, and their normalisation."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn

from fpcn_dist.models import FPCN, Classifier, build_backbone
from fpcn_dist.runtime.errors import UserError


def images(count: int = 3, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("name", "channels"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("resnet101", 2048)]
)
def test_resnets_are_torchvisions_without_their_classifier(name: str, channels: int) -> None:
    torch.manual_seed(0)
    expected = getattr(torchvision.models, name)()
    torch.manual_seed(0)
    backbone = build_backbone(name)
    assert backbone.channels == channels
    weights = {key: value for key, value in expected.state_dict().items() if not key.startswith("fc.")}
    assert backbone.net.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in backbone.net.state_dict().items())


def test_resnet_features_are_torchvisions() -> None:
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18().eval()
    backbone = build_backbone("resnet18").eval()
    backbone.net.load_state_dict(resnet.state_dict(), strict=False)
    features = backbone(images())
    assert features.shape == (3, 512, 2, 2)
    torch.testing.assert_close(resnet.fc(features.mean((2, 3))), resnet(images()))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_companion_is_the_output_of_the_block_before_the_last(name: str) -> None:
    backbone = build_backbone(name).eval()
    seen = []
    backbone.net.layer4[-2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    features, companion = backbone.forward_with_companion(images())
    assert torch.equal(companion, seen[0])
    assert companion.shape == features.shape
    assert torch.equal(features, backbone(images()))


TIMM = {
    "mobilenetv1_100": (1024, 64),
    "mobilenetv2_100": (1280, 64),
    "mobilenetv3_small_100": (576, 64),  # has a projection after its pooling
    "convnext_atto": (320, 64),  # has a normalisation after its pooling
    "swin_tiny_patch4_window7_224": (768, 224),  # keeps its features in NHWC
    "resnet10t.c3_in1k": (512, 64),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_give_feature_maps_and_train_all_their_parameters(name: str) -> None:
    channels, side = TIMM[name]
    backbone = build_backbone(name)
    features = backbone(images(2, side))
    assert features.shape == (2, channels, side // 32, side // 32)
    assert backbone.channels == channels
    features.square().mean().backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_features_in_nhwc_are_turned_round() -> None:
    backbone = build_backbone("swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        features = backbone.net.forward_features(images(1, 224))
        assert torch.equal(backbone(images(1, 224)), features.permute(0, 3, 1, 2))


def test_timm_features_are_those_that_its_own_classifier_pools() -> None:
    torch.manual_seed(0)
    whole = timm.create_model("mobilenetv2_100").eval()
    backbone = build_backbone("mobilenetv2_100").eval()
    backbone.net.load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(whole.classifier(backbone(images()).mean((2, 3))), whole(images()))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("mobilnetv2_100", "did you mean 'mobilenetv2_100'"),
        ("resnet-101", "did you mean 'resnet101'"),
        ("resnet18.a1_in2k", "did you mean 'resnet18.a1_in1k'"),
        ("mobilenet_v4", "did you mean 'mobilenet_v"),
        ("shuflenet_v2_x1_5", "did you mean 'shufflenet_v2_x1_5'"),
        ("?", "choose one of resnet101, resnet18, resnet34, resnet50"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        build_backbone(name)
    assert caught.value.field == "model.backbone"
    assert caught.value.value == name
    assert advice in caught.value.hint


STUDENTS = {
    "resnet18": (512, 2, torchvision.models.resnet18),
    "resnet34": (512, 2, torchvision.models.resnet34),
    "resnet50": (2048, 2, torchvision.models.resnet50),
    "mobilenet_v1": (1024, 2, functools.partial(timm.create_model, "mobilenetv1_100")),
    "mobilenet_v2": (1280, 2, torchvision.models.mobilenet_v2),
    "shufflenet_v2_x1_5": (1024, 2, torchvision.models.shufflenet_v2_x1_5),
}
OTHERS = {
    "googlenet": (1024, 1, functools.partial(torchvision.models.googlenet, aux_logits=False, init_weights=True)),
    "mnasnet0_5": (1280, 2, torchvision.models.mnasnet0_5),
    "mobilenet_v3_small": (1024, 1, torchvision.models.mobilenet_v3_small),
    "regnet_x_400mf": (400, 2, torchvision.models.regnet_x_400mf),
}


@pytest.mark.parametrize("name", STUDENTS | OTHERS)
def test_students_are_the_published_networks_with_another_classifier(name: str) -> None:
    channels, side, published = (STUDENTS | OTHERS)[name]
    model = Classifier(name, 7)
    features = model.backbone(images(2))
    assert features.shape == (2, channels, side, side) and model.backbone.channels == channels
    logits = model(images(2))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    expected = sum(parameter.numel() for parameter in published(num_classes=7).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("mobilenet_v2", "classifier.1"),
        ("shufflenet_v2_x1_5", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("mnasnet0_5", "classifier.1"),
        ("regnet_x_400mf", "fc"),
        ("swin_t", "head"),
    ],
)
def test_torchvision_features_are_those_that_its_own_classifier_pools(name: str, classifier: str) -> None:
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name).eval()
    backbone = build_backbone(name).eval()
    missing, unexpected = backbone.net.load_state_dict(whole.state_dict(), strict=False)
    assert missing == [] and unexpected == [f"{classifier}.weight", f"{classifier}.bias"]
    with torch.no_grad():
        pooled = backbone(images()).mean((2, 3))
        assert pooled.std() > 0
        torch.testing.assert_close(whole.get_submodule(classifier)(pooled), whole(images()))


def test_efficientnet_of_torchvision_has_a_feature_map() -> None:
    with torch.device("meta"):
        assert build_backbone("efficientnet_v2_s")(torch.zeros(2, 3, 64, 64)).shape == (2, 1280, 2, 2)


def test_a_torchvision_network_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.backbone squeezenet1_1: it has no linear layer at its end.*; use an"):
        build_backbone("squeezenet1_1")


@pytest.mark.parametrize("name", ["lenet", "mobilenet_v3_small"])
def test_no_region_without_a_feature_map(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.backbone {name}: it gives no feature map .*; use a network"):
        FPCN(name, 3)
    assert FPCN(name, 3, region="none").backbone.channels


# --- normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_frozen_batch_norm_never_changes(name: str) -> None:
    backbone = build_backbone(name, norm="frozen_batch")
    layers = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    before = copy.deepcopy(backbone.state_dict())
    for _ in range(2):  # freshly built, and after a turn of evaluation
        backbone(images()).sum().backward()
        backbone.eval()
        backbone.train()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not any(layer.training or layer.weight.requires_grad or layer.bias.requires_grad for layer in layers)
    trained = {key for key, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, module in backbone.named_parameters() if module.requires_grad}
    assert any("conv" in key for key in trained)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "shufflenet_v2_x1_5"])
def test_group_norm_makes_images_independent_and_keeps_activations(name: str) -> None:
    published, backbone = build_backbone(name), build_backbone(name, norm="group")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    for kind in (nn.ReLU, nn.ReLU6):
        counts = [sum(isinstance(module, kind) for module in net.modules()) for net in (published, backbone)]
        assert counts[0] == counts[1]
    assert sum(p.numel() for p in published.parameters()) == sum(p.numel() for p in backbone.parameters())
    backbone.double()
    together = backbone(images().double())
    one_by_one = torch.cat([backbone(image[None].double()) for image in images()])
    torch.testing.assert_close(together, one_by_one, rtol=1e-10, atol=1e-10)
    together.square().mean().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_group_norm_starts_from_the_scales_of_the_layer_that_it_replaces() -> None:
    published, backbone = build_backbone("resnet10t", norm="batch"), build_backbone("resnet10t", norm="group")
    scales = [
        sorted(
            float(p.detach().mean()) for name, p in net.named_parameters() if p.ndim == 1 and name.endswith("weight")
        )
        for net in (published, backbone)
    ]
    assert scales[0] == scales[1]
    assert scales[0][0] == 0.0 and scales[0][-1] == 1.0  # timm starts each block's last scale at 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_synchronised_batch_norm_of_one_process_is_batch_norm(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, norm="sync_batch")
    assert any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    torch.manual_seed(0)
    torch.testing.assert_close(backbone(images()), build_backbone(name)(images()))


def test_synchronised_batch_norm_is_refused_between_cpu_ranks_in_training_only() -> None:
    backbone = build_backbone("resnet18", norm="sync_batch")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for forward in (backbone, backbone.forward_with_companion):
            with pytest.raises(UserError, match=r"model.norm sync_batch: .*; use group or frozen_batch"):
                forward(images())
        assert backbone.eval()(images()).isfinite().all()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("norm", ["sync_batch", "frozen_batch", "group"])
def test_a_network_without_batch_norm_has_none_to_replace(norm: str) -> None:
    with pytest.raises(UserError, match=f"model.norm {norm}: .*no BatchNorm to replace; use batch"):
        build_backbone("convnext_atto", norm=norm)


@pytest.mark.parametrize("pretrained", [True, "weights.pth"])
def test_group_norm_refuses_weights_that_were_trained_without_it(pretrained: bool | str) -> None:
    with pytest.raises(UserError, match=r"model.norm group: .*; set model.pretrained to false"):
        build_backbone("resnet18", pretrained=pretrained, norm="group")
