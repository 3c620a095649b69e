"""Networks by name, and what their libraries say of how images were shown to them."""

from __future__ import annotations

import pytest
import timm
import torchvision

from fpcn_dist.models.published import Network, find_network, published
from fpcn_dist.recipe.preprocessing import IMAGENET, Preprocessing

HALF = (0.5, 0.5, 0.5)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("name", "expected", "size"),
    [
        ("resnet101", IMAGENET, 224),
        ("mobilenet_v2", IMAGENET, 224),
        ("lenet", IMAGENET, None),
        ("mobilenet_v1", Preprocessing(mean=HALF, std=HALF, interpolation="bicubic"), 224),
        ("tf_efficientnet_lite2", Preprocessing(mean=HALF, std=HALF, interpolation="bicubic"), 260),
        ("test_resnet", Preprocessing(mean=HALF, std=HALF), 160),
        ("vit_base_patch16_clip_224.openai", Preprocessing(mean=CLIP[0], std=CLIP[1], interpolation="bicubic"), 224),
        ("torchvision/swin_t", Preprocessing(interpolation="bicubic"), 224),
        ("vit_h_14", Preprocessing(interpolation="bicubic"), 518),
        ("darknet17", IMAGENET, 256),
    ],
)
def test_it_is_what_the_library_publishes(
    name: str, expected: Preprocessing, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, build in ((timm, "create_model"), (torchvision.models, "get_model")):
        monkeypatch.setattr(module, build, None)  # no network is built for it
    assert published(name) == (expected, size)


def test_a_network_of_two_libraries_is_taken_from_the_one_that_is_named() -> None:
    assert find_network("vgg16") == ("timm", "vgg16") and find_network("torchvision/vgg16") == ("torchvision", "vgg16")
    assert find_network("resnet18") == ("torchvision", "resnet18") == find_network("torchvision/resnet18")
    assert find_network("resnet18.a1_in1k") == ("timm", "resnet18.a1_in1k")


def test_a_tag_names_weights_and_not_another_architecture() -> None:
    tagged, plain = find_network("mobilenetv2_100.ra_in1k"), find_network("mobilenetv2_100")
    assert tagged != plain and tagged.architecture == plain.architecture
    assert Network("torchvision", "vgg16").architecture != Network("timm", "vgg16").architecture
