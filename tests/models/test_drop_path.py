"""Stochastic depth by recipe."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torchvision
from torchvision.ops import StochasticDepth

from fpcn_dist.models import FPCN, BilinearCNN, Classifier, build_backbone, build_model
from fpcn_dist.recipe.schema import ModelConfig
from fpcn_dist.runtime.errors import UserError


def test_timms_networks_drop_residual_blocks_in_training_alone() -> None:
    backbone = build_backbone("test_convnext", drop_path=0.4)
    rates = [module.drop_prob for module in backbone.modules() if isinstance(module, timm.layers.DropPath)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.4)
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    assert not torch.equal(backbone(images), backbone(images))
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))


def test_torchvisions_networks_drop_as_their_constructor_would() -> None:
    with torch.device("meta"):
        published = torchvision.models.convnext_tiny(stochastic_depth_prob=0.3)
        backbone = build_backbone("torchvision/convnext_tiny", drop_path=0.3)
        usual = build_backbone("torchvision/convnext_tiny")
    ours, theirs, untouched = (
        [module.p for module in net.modules() if isinstance(module, StochasticDepth)]
        for net in (backbone, published, usual)
    )
    assert ours == pytest.approx(theirs) and len(ours) == 18
    assert untouched[-1] == pytest.approx(0.1)  # its own


@pytest.mark.parametrize("name", ["resnet18", "lenet", "vgg11", "mobilenet_v2"])
def test_a_network_without_residual_blocks_to_drop_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.drop_path 0.1: {name} has no stochastic depth; set it to null"):
        build_backbone(name, drop_path=0.1)


def test_every_network_of_a_recipe_heeds_it() -> None:
    config = ModelConfig(backbone="test_convnext", pretrained=False, drop_path=0.2, hidden=8)
    for task, kind in (("contrast", FPCN), ("classify", Classifier), ("bilinear_cnn", BilinearCNN)):
        model = build_model(config, 3, task=task)
        assert type(model) is kind
        assert any(isinstance(module, timm.layers.DropPath) for module in model.modules())
    resnet = ModelConfig(backbone="resnet50", pretrained=False, drop_path=0.2)
    for task in ("mmal_net", "pca_net"):
        with pytest.raises(UserError, match=r"model.drop_path 0.2: resnet50 has no stochastic depth"):
            build_model(resnet, 3, task=task)
    with pytest.raises(UserError, match=r"model.drop_path 0.2: vgg16 has no stochastic depth"):
        build_model(resnet.changed(backbone="vgg16"), 3, task="bilinear_cnn")
