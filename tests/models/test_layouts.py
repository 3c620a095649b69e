"""Maps of every family of networks: where the cells lie, that all parameters learn, and which image sizes are taken."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fpcn_dist.models import FPCN, Classifier, build_backbone
from fpcn_dist.runtime.errors import UserError

SMALL_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SMALL_FASTVIT = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}

FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "ViT": ("test_vit", {}, 64, 16),
    "DeiT with a distillation token": ("deit_tiny_distilled_patch16_224", SMALL_VIT, 48, 16),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", SMALL_VIT, 48, 14),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL_VIT, 48, 16),
    "EVA-02": ("eva02_tiny_patch14_224", SMALL_VIT, 48, 14),
    "SigLIP": ("vit_base_patch16_siglip_224", SMALL_VIT, 48, 16),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)},
        96,
        32,
    ),
    "ConvNeXt": ("test_convnext", {}, 64, 32),
    "CaFormer": ("caformer_s18", {}, 512, 32),
    "PoolFormer": ("poolformer_s12", {}, 512, 32),
    "FastViT": ("fastvit_t8", SMALL_FASTVIT, 256, 32),
    "MobileNetV4": ("mobilenetv4_conv_small_035", {}, 336, 32),
    "MobileNetV3": ("mobilenetv3_small_050", {}, 288, 32),
    "GhostNet": ("ghostnet_050", {}, 480, 32),
    "CaiT, whose class token comes last": ("cait_xxs24_224", SMALL_VIT, 48, 16),
}
"""Of each family a network, what makes it small, its channels, and pixels of a cell."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int, int]:
    name, small, channels, stride = FAMILIES[request.param]
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **small))
    torch.manual_seed(0)
    return name, channels, stride


def test_every_family_gives_a_map_and_trains_all_its_parameters(family: tuple[str, int, int]) -> None:
    name, channels, stride = family
    backbone = build_backbone(name)
    assert backbone.has_map and backbone.channels == channels
    side = backbone.published_side if name.startswith("cait") else 4 * stride
    features = backbone(torch.randn(2, 3, side, side))
    assert features.shape == (2, channels, side // stride, side // stride) and features.dtype == torch.float32
    (features * torch.randn_like(features)).sum().backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_cells_lie_where_they_look(family: tuple[str, int, int]) -> None:
    """A change in one part of the image moves the cells there the most."""
    name, _, stride = family
    backbone = build_backbone(name).eval()
    side = backbone.published_side if name.startswith("cait") else 7 * stride
    images = torch.randn(4, 3, side, side)
    with torch.no_grad():
        before = backbone(images)
        for row, column in ((1, 5), (5, 2)):
            changed = images.clone()
            changed[..., row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] *= 5.0
            moved_HW = (backbone(changed) - before).square().sum((0, 1))
            found = divmod(int(moved_HW.argmax()), moved_HW.shape[1])
            assert max(abs(found[0] - row), abs(found[1] - column)) <= (0 if backbone.ends_in_tokens else 2)


def tokens(net: Any, images: Tensor) -> Tensor:
    """timm's patch tokens, [B, C, h, w], of square images."""
    found = net.eval().forward_features(images)[:, net.num_prefix_tokens :]
    return found.transpose(1, 2).unflatten(2, (round(found.shape[1] ** 0.5), -1))


@pytest.mark.parametrize("side", [160, 96])
def test_a_map_of_tokens_is_timms_at_every_size(side: int) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("test_vit").eval()
    published: Any = timm.create_model("test_vit", num_classes=0, img_size=side)
    from timm.models.vision_transformer import checkpoint_filter_fn

    published.load_state_dict(checkpoint_filter_fn(dict(backbone.net.state_dict()), published))
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), tokens(published, images))


def test_the_plain_classifier_averages_patch_tokens_and_a_region_masks_them() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    classifier = Classifier("test_vit", 3).eval()
    pooled = classifier.pool(images)
    torch.testing.assert_close(pooled.pooled, classifier.backbone(images).mean((2, 3)))
    model = FPCN("test_vit", 3, hidden=8).eval()
    torch.nn.init.uniform_(model.backbone.net.norm.weight)  # at the start a token's channels sum to zero
    found = model.pool(images)
    assert found.mask.shape == (2, 4, 4) and 0 < found.mask.sum() < 32


def test_in_low_precision_the_map_is_of_that_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        features = build_backbone("test_vit")(torch.randn(1, 3, 32, 32))
    assert features.shape == (1, 64, 2, 2) and features.isfinite().all()


@pytest.mark.parametrize(
    ("name", "side", "why", "hint"),
    [
        ("test_vit", 100, "Input height (100) should be divisible by patch size (16)", "use 96 or 112"),
        ("test_vit_relpos", 96, "Input height (96) doesn't match model (160)", "use 160"),
        ("test_maxvit", 100, "takes no images of this size", "use 160"),
    ],
)
def test_a_size_that_a_network_refuses_is_named_with_the_next_that_work(
    name: str, side: int, why: str, hint: str
) -> None:
    backbone = build_backbone(name)
    with pytest.raises(UserError) as caught:
        backbone(torch.zeros(2, 3, side, side))
    error = caught.value
    assert (error.field, error.value, error.hint) == ("data.crop", side, hint) and why in error.reason
    for good in map(int, hint.removeprefix("use ").split(" or ")):
        assert backbone(torch.zeros(1, 3, good, good)).isfinite().all()


def test_torchvisions_transformers_name_their_size_too() -> None:
    with torch.device("meta"):
        backbone = build_backbone("vit_b_32")
        with pytest.raises(UserError, match=r"data.crop 96: .*\(VisionTransformer\).*; use 224"):
            backbone(torch.zeros(1, 3, 96, 96))


def test_what_is_no_matter_of_size_stays_as_it_was() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        build_backbone("test_vit")(torch.zeros(1, 4, 64, 64))


def test_a_compiled_map_of_tokens_is_the_same() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("test_vit").eval()
    images = torch.randn(2, 3, 64, 64)
    expected = backbone(images)
    backbone.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(backbone(images), expected)


def test_of_several_scales_the_map_is_the_last() -> None:
    backbone = build_backbone("coat_lite_tiny")
    features = backbone(torch.zeros(2, 3, 224, 224))
    assert features.shape == (2, backbone.channels, 7, 7) == (2, 320, 7, 7)
    features.sum().backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_what_never_learns_is_a_constant() -> None:
    """A parameter that is none of the map's, and one that is fixed as published, are not made to learn by a thaw."""
    backbone = build_backbone("efficientvim_m1")
    backbone.freeze("none")
    assert not backbone.net.weights.requires_grad
    backbone(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_a_network_whose_map_hangs_on_what_never_learns_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.backbone crossvit_9_240: its map cannot be had without layers"):
        build_backbone("crossvit_9_240")
