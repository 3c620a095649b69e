"""FPCN and its baseline: parameters, pooling, single-image logits, and every alternative of the recipe."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
import torch
from fpcn_kernels import PairHead, pair_contrast
from torch import nn

from fpcn_dist.models import FPCN, Classifier, build_model
from fpcn_dist.recipe.schema import ModelConfig
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.tasks.losses import gated_contrast_loss, hardest_pairs

CLASSES = 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def images() -> torch.Tensor:
    return torch.randn(6, 3, 96, 96, generator=torch.Generator().manual_seed(3))


def small(**options: Any) -> FPCN:
    torch.manual_seed(0)
    return FPCN("resnet18", CLASSES, **{"hidden": 16, **options})


def layers(model: FPCN) -> list[nn.Parameter]:
    return [
        tensor for layer in (model.fuse_in, model.fuse_out, model.classifier) for tensor in (layer.weight, layer.bias)
    ]


def test_parameter_counts_are_the_papers() -> None:
    assert sum(p.numel() for p in FPCN("resnet101", 200).parameters()) == 46_058_248


def test_baseline_has_one_linear_layer() -> None:
    assert sum(p.numel() for p in Classifier("resnet18", 1000).parameters()) == 11_689_512


def test_state_dict_names_the_parts() -> None:
    names = list(small().state_dict())
    assert {name.split(".")[0] for name in names} == {"backbone", "fuse_in", "fuse_out", "classifier"}
    assert "backbone.net.layer4.1.conv2.weight" in names
    assert {name.split(".")[0] for name in Classifier("resnet18", 2).state_dict()} == {"backbone", "classifier"}


ALTERNATIVES: list[dict[str, Any]] = [
    {},
    {"theta": 0.3},
    {"region": "largest"},
    {"region": "largest", "companion": True, "theta": 0.1},
    {"region": "none"},
    {"area_scale": False},
    {"head": "gated"},
    {"head": "gated", "activation": "identity", "dropout": 0.5},
    {"activation": "identity"},
    {"dropout": 0.5},
    {"fuse_init": "default"},
    {"inference": "plain"},
    {"norm": "group"},
    {"norm": "frozen_batch"},
    {"norm": "sync_batch"},
    {"backbone": "mobilenetv3_small_100"},
    {"backbone": "convnext_atto"},
]


@pytest.mark.parametrize("options", ALTERNATIVES, ids=str)
def test_every_alternative_builds_infers_and_trains_all_its_parameters(options: dict[str, Any]) -> None:
    config = ModelConfig(**{"backbone": "resnet18", "pretrained": False, "hidden": 16, **options})
    model = build_model(config, CLASSES, task="contrast")
    assert isinstance(model, FPCN)
    pooled, mask, area = model.pool(images())
    channels = model.backbone.channels
    assert pooled.shape == (6, channels) and mask.shape == (6, 3, 3) and area.shape == (6,)
    arguments = {"activation": config.activation, "dropout": config.dropout, "seed": 1}
    if config.head == "gated":
        arguments["pairs"] = hardest_pairs(pooled, LABELS)
    contrast = gated_contrast_loss if config.head == "gated" else pair_contrast
    contrast(pooled, LABELS, PairHead(*layers(model)), **arguments).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(p.grad.any() for p in layers(model))
    model.eval()
    logits = model(images())
    assert logits.shape == (6, CLASSES) and logits.isfinite().all()
    torch.testing.assert_close(logits, model.logits(model.pool(images()).pooled))


def test_the_classify_task_builds_the_baseline() -> None:
    config = ModelConfig(backbone="resnet18", pretrained=False, norm="group")
    model = build_model(config, CLASSES, task="classify")
    assert type(model) is Classifier
    model(images()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pooling_follows_the_equations() -> None:
    model = small(theta=0.25).double().eval()
    result = model.pool(images().double())
    features = model.backbone(images().double())
    for x, f, m, a in zip(result.pooled, features, result.mask, result.area, strict=True):
        activation = f.sum(0)
        expected = torch.where(activation >= activation.mean(), 1.0, 0.25).double()
        alpha = expected.mean()
        torch.testing.assert_close(m, expected)
        torch.testing.assert_close(a, alpha)
        torch.testing.assert_close(x, (alpha * expected * f).mean((1, 2)), rtol=1e-10, atol=1e-12)


def test_without_area_scale_alpha_is_left_out_of_equation_5() -> None:
    scaled, plain = (small(area_scale=scale).eval().pool(images()) for scale in (True, False))
    assert torch.equal(scaled.area, plain.area) and scaled.area.max() < 1
    torch.testing.assert_close(plain.pooled * plain.area[:, None], scaled.pooled)


@pytest.mark.parametrize("baseline", [False, True])
def test_without_a_region_pooling_is_the_global_average(baseline: bool) -> None:
    model = Classifier("resnet18", CLASSES).eval() if baseline else small(region="none").eval()
    pooled, mask, area = model.pool(images())
    assert torch.equal(pooled, model.backbone(images()).mean((2, 3)))
    assert torch.equal(mask, torch.ones(6, 3, 3)) and torch.equal(area, torch.ones(6))


def test_the_companion_takes_part_in_the_region() -> None:
    alone, intersected = (
        small(region="largest", companion=companion).eval().pool(images()) for companion in (False, True)
    )
    assert not torch.equal(alone.mask, intersected.mask)


@pytest.mark.parametrize("companion", [False, True])
def test_a_compiled_backbone_computes_all_features(companion: bool) -> None:
    """All of them in one graph, also where the companion takes part."""
    model = small(region="largest", companion=companion).eval()
    expected = model.pool(images())
    graphs = []
    model.backbone.compile(backend=lambda graph, _: (graphs.append(graph), graph.forward)[1], fullgraph=True)
    torch.testing.assert_close(model.pool(images()), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("region", ["none", "threshold", "largest"])
def test_pooling_is_in_float32_under_autocast(region: str) -> None:
    model = small(region=region).eval()
    with torch.autocast("cpu", torch.bfloat16):
        features = model.backbone(images())
        pooled, mask, area = model.pool(images())
    assert features.dtype == torch.bfloat16
    assert pooled.dtype == mask.dtype == area.dtype == torch.float32
    expected = (features.float() * (area[:, None, None] * mask)[:, None]).mean((2, 3))
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)


def test_training_starts_as_a_plain_classifier() -> None:
    model = small().eval()
    pooled = model.pool(images()).pooled
    plain = model.classifier(pooled)
    assert 0 < (model.logits(pooled) - plain).abs().max() < 0.05 * plain.abs().max()
    nn.init.zeros_(model.fuse_out.weight)
    assert torch.equal(model.logits(pooled), plain)


def test_the_framework_default_starts_elsewhere() -> None:
    model = small(fuse_init="default").eval()
    pooled = model.pool(images()).pooled
    plain = model.classifier(pooled)
    assert (model.logits(pooled) - plain).abs().max() > 0.5 * plain.abs().max()


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("head", ["product", "gated"])
def test_single_image_logits_are_those_of_its_pair_with_itself(head: str, activation: str) -> None:
    model = small(head=head, activation=activation, fuse_init="default", dropout=0.5).double()
    x = torch.randn(4, 512, dtype=torch.float64)
    hidden = torch.cat([x, x], 1) @ model.fuse_in.weight.T + model.fuse_in.bias
    fused = (hidden.clamp(min=0) if activation == "relu" else hidden) @ model.fuse_out.weight.T + model.fuse_out.bias
    seen = x * fused if head == "product" else x + x / (1 + (-x * fused).exp())
    expected = seen @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model.logits(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", ["product", "gated"])
def test_plain_inference_classifies_the_pooled_vector(head: str) -> None:
    model = small(head=head, inference="plain", fuse_init="default")
    x = torch.randn(4, 512)
    assert torch.equal(model.logits(x), model.classifier(x))


def test_a_companion_needs_a_network_whose_blocks_are_known() -> None:
    with pytest.raises(UserError, match=r"model.companion True: .*mobilenetv2_100.*; set model.companion to false"):
        FPCN("mobilenetv2_100", CLASSES, region="largest", companion=True)


@pytest.mark.parametrize("options", [{"head": "gate"}, {"hiden": 16}, {"theta": 1.0}, {"companion": True}], ids=str)
def test_options_are_checked_as_in_a_recipe(options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(options))):
        FPCN("resnet18", CLASSES, **options)
