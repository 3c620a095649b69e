"""Freezing by depth: what is frozen is a constant function of the images, and thaws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fpcn_dist.models import build_backbone
from fpcn_dist.models.depth import layer_depths
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.training.schedule import Schedule


def step(backbone: nn.Module) -> None:
    """Forward, backward and an update in training mode, which moves BatchNorm's statistics too."""
    learning = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    output = backbone(torch.randn(4, 3, 32, 32))
    if learning:
        output.square().mean().backward()
        torch.optim.SGD(learning, 0.1).step()


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", ("conv1.", "bn1.")),
        ("mobilenet_v2", ("features.0.",)),
        ("test_efficientnet", ("conv_stem.", "bn1.")),
    ],
)
def test_a_frozen_stem_changes_in_nothing_and_the_rest_learns(name: str, stem: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name)
    backbone.freeze("stem")
    before = {key: value.clone() for key, value in backbone.net.state_dict().items()}
    for _ in range(2):  # and after a turn of evaluation
        step(backbone)
        backbone.eval()
        backbone.train()
    same = {key for key, value in backbone.net.state_dict().items() if torch.equal(value, before[key])}
    assert same == {key for key in before if key.startswith(stem)}


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet"])
def test_a_frozen_backbone_is_a_constant_function_in_training(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name)
    images = torch.randn(4, 3, 32, 32)
    backbone(images)  # statistics that are not those of the start
    expected = backbone.eval()(images)
    backbone.train()
    backbone.freeze("backbone")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    step(backbone)
    assert torch.equal(backbone(images), expected)
    torch.testing.assert_close(backbone(images[:1]), expected[:1])
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_a_thawed_backbone_learns_everything_again() -> None:
    backbone = build_backbone("resnet18")
    backbone.freeze("backbone")
    backbone.freeze("none")
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(module.training for module in backbone.modules())


def test_norms_that_the_recipe_freezes_stay_so_at_the_thaw() -> None:
    backbone = build_backbone("resnet18", norm="frozen_batch")
    backbone.freeze("stem")
    assert not backbone.net.conv1.weight.requires_grad and backbone.net.layer1[0].conv1.weight.requires_grad
    backbone.freeze("none")
    assert backbone.net.conv1.weight.requires_grad and not backbone.net.bn1.weight.requires_grad
    assert not backbone.net.layer1[0].bn1.training


def test_depths_follow_the_network_from_the_images_on() -> None:
    depths, head = layer_depths(build_backbone("resnet18").net)
    assert head == 9 and depths["conv1.weight"] == depths["bn1.bias"] == 0
    assert [depths[f"layer{s}.{b}.conv2.weight"] for s in (1, 2, 3, 4) for b in (0, 1)] == list(range(1, 9))
    depths, head = layer_depths(build_backbone("test_efficientnet").net)
    assert depths["conv_stem.weight"] == 0 < depths["blocks.0.0.conv.weight"] < depths["conv_head.weight"] == head - 1


@pytest.mark.parametrize(
    ("optim", "frozen", "thaw"),
    [
        ({}, 0, 0),
        ({"freeze": "backbone"}, 50, 50),
        ({"freeze": "backbone", "freeze_epochs": 3}, 15, 15),
        ({"freeze": "backbone", "freeze_epochs": 30}, 50, 50),
        ({"freeze": "stem", "freeze_epochs": 3}, 0, 15),
        ({"freeze_epochs": 3}, 0, 0),
        ({"freeze_backbone_epochs": 3}, 15, 15),
        ({"freeze_backbone_epochs": 0}, 0, 0),
    ],
    ids=str,
)
def test_how_long_it_is_frozen(optim: dict, frozen: int, thaw: int) -> None:
    recipe = Recipe.model_validate({"optim": optim, "train": {"epochs": 10}})
    schedule = Schedule.of(recipe, batch_size=6, per_epoch=5)
    assert (schedule.frozen, schedule.thaw) == (frozen, thaw)
