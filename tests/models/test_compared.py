"""The compared networks: their sizes, and each of their operations against loops written from their descriptions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fpcn_dist.models import build_backbone, build_model
from fpcn_dist.models.compared.bilinear_cnn import bilinear_pool
from fpcn_dist.models.compared.mmal_net import _windows, crop, object_boxes, part_boxes
from fpcn_dist.models.compared.pca_net import attentive_pool, co_attention, erase
from fpcn_dist.recipe.schema import ModelConfig
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.tasks.losses import random_partners

PUBLISHED = [
    # torchvision's tables for 1,000 classes; GoogLeNet's is without its auxiliary classifiers.
    ("classify", "alexnet", 1000, 61_100_840),
    ("classify", "googlenet", 1000, 6_624_904),
    ("classify", "torchvision/vgg16", 1000, 138_357_544),
    ("classify", "resnet50", 1000, 25_557_032),
    # LeNet-5 has 61,706 with one colour (its 5 x 5 kernels see 6 x 25 x 2 more weights with three).
    ("classify", "lenet", 10, 61_706 + 300),
    # VGG16's 14,714,688 and Linear(512 x 512, 200): the published 67.14 M.
    ("bilinear_cnn", "vgg16", 200, 14_714_688 + 512 * 512 * 200 + 200),
    # The published 22.32 M count a convolution with its BatchNorm that no image passes through.
    ("pca_net", "resnet50", 200, 22_322_440 - 512 * 2048 - 2 * 2048),
    # API-Net is FPCN's head on another path; MMAL-Net a ResNet-50 and a layer for 200 classes.
    ("contrast", "resnet101", 200, 46_058_248),
    ("mmal_net", "resnet50", 200, 25_557_032 - 2_049_000 + 2048 * 200 + 200),
]


@pytest.mark.parametrize(("task", "backbone", "classes", "count"), PUBLISHED)
def test_parameters_are_those_of_the_source(task, backbone, classes, count):
    with torch.device("meta"):
        model = build_model(ModelConfig(backbone=backbone, pretrained=False), classes, task=task)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("pca_net", {"backbone": "resnet18"}, "bottleneck block.*use resnet50 or resnet101"),
        ("mmal_net", {"backbone": "mobilenet_v1"}, "which MMAL-Net needs.*use resnet18"),
        ("bilinear_cnn", {"backbone": "alexnet"}, "no feature map.*use vgg16"),
        ("classify", {"backbone": "lenet", "pretrained": True}, "no published weights for lenet"),
        ("classify", {"backbone": "torchvision/vgg61"}, "no such network.*did you mean"),
    ],
)
def test_other_backbones_are_refused(task, options, message):
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(**{"pretrained": False} | options), 3, task=task)


def test_the_prefix_takes_torchvisions_network_where_timm_has_one_too():
    with torch.device("meta"):
        assert build_backbone("torchvision/vgg16").channels == 4096
    assert build_backbone("torchvision/resnet18").has_map is False


def test_lenet_shrinks_any_image():
    model = build_model(ModelConfig(backbone="lenet", pretrained=False), 3, task="classify")
    assert model(torch.randn(2, 3, 75, 50)).shape == (2, 3)


def test_bilinear_pooling():
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    for image in range(2):
        expected = []
        for c in range(3):
            for m in range(4):
                mean = sum(float(first[image, c, p] * second[image, m, p]) for p in range(5)) / 5
                expected.append(math.copysign(math.sqrt(abs(mean) + 1e-5), mean))
        length = math.sqrt(sum(x * x for x in expected))
        found = bilinear_pool(first, second)[image]
        torch.testing.assert_close(found, torch.tensor([x / length for x in expected], dtype=torch.float64))
    torch.testing.assert_close(attentive_pool(first, second), 100 * bilinear_pool(first, second))
    maps = torch.rand(1, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bilinear_pool(x, x), maps)
    dead = torch.zeros(1, 3, 4, requires_grad=True)
    bilinear_pool(dead, dead).sum().backward()
    assert dead.grad is not None and dead.grad.isfinite().all()


def test_co_attention_looks_for_what_the_other_image_lacks():
    torch.manual_seed(0)
    own, other = torch.rand(1, 3, 5, dtype=torch.float64), torch.rand(1, 3, 5, dtype=torch.float64)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for m in range(3):
        weights = [math.exp(-float(own[0, m] @ other[0, n])) for n in range(3)]
        for n in range(3):
            expected[m] += weights[n] / sum(weights) * own[0, n]
        expected[m] += own[0, m]
    torch.testing.assert_close(co_attention(own, other)[0], expected)


def test_erasing_blanks_what_the_drawn_map_looks_at():
    attention = torch.zeros(2, 2, 4, 4)
    attention[:, 0, :2] = 1.0  # the upper half, more of it
    attention[:, 1, 3, 3] = 1.0
    images = torch.ones(2, 3, 8, 8)
    # Square roots of the means 0.5 and 0.0625: the first map is drawn with probability 0.739.
    upper, corner = erase(images, attention, torch.tensor([[0.73, 0.0], [0.75, 0.0]]))
    assert (upper[:, :3] == 0).all() and (upper[:, 6:] == 1).all()
    assert (corner[:, 7, 7] == 0).all() and (corner[:, :5] == 1).all()
    hard, soft = erase(images, attention, torch.tensor([[0.0, 0.0], [0.0, 0.999]]))
    assert (hard == 0).sum() > (soft == 0).sum() > 0


def test_partners_are_other_images_of_the_class():
    labels = torch.tensor([0, 1, 0, 0, 1, 2])
    seen = set()
    for seed in range(40):
        partners = random_partners(labels, 2, torch.Generator().manual_seed(seed))
        assert partners.shape == (6, 2) and (labels[partners] == labels[:, None]).all()
        assert partners[0, 0] != partners[0, 1] and 0 not in partners[0]
        assert sorted(partners[1].tolist()) == [1, 4], "one other image, then itself"
        assert partners[5].tolist() == [5, 5]
        seen.add(tuple(partners[0].tolist()))
    assert seen == {(2, 3), (3, 2)}


def test_object_boxes_are_those_of_the_published_code():
    torch.manual_seed(0)
    masks = (torch.rand(20, 14, 14) > 0.97).float()
    masks[:, 5, 7] = 1.0
    masks[0] = 0.3
    masks[0, 0, 0] = 1.0
    masks[1] = 1.0
    for mask, box in zip(masks, object_boxes(masks, (448, 448)).tolist(), strict=True):
        rows = [r for r in range(14) if any(mask[r, c] == 1 for c in range(14))]
        columns = [c for c in range(14) if any(mask[r, c] == 1 for r in range(14))]
        ends = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
        assert box == [max(0, 32 * n - 1) for n in ends]


def test_crops_are_interpolated_slices():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 30)
    boxes = torch.tensor([[[0, 0, 39, 29], [3, 4, 20, 9]], [[7, 0, 7, 29], [10, 11, 39, 29]]]).float()
    found = crop(images, boxes, (16, 12))
    assert found.shape == (2, 2, 3, 16, 12)
    for image in range(2):
        for number in range(2):
            top, left, bottom, right = boxes[image, number].int().tolist()
            part = images[image : image + 1, :, top : bottom + 1, left : right + 1]
            expected = F.interpolate(part, (16, 12), mode="bilinear", align_corners=True)[0]
            torch.testing.assert_close(found[image, number], expected, atol=1e-5, rtol=1e-5)


def test_windows_of_the_published_size():
    groups = _windows((14, 14), (448, 448))
    assert groups[0][0] == [(4, 4), (3, 5), (5, 3)]
    assert [len(boxes) for _, boxes in groups] == [361, 241, 7 * 7 + 2 * 9 * 5 + 2 * 8 * 6 + 2 * 8 * 5]
    assert groups[0][1][0].tolist() == [0, 0, 127, 127] and groups[0][1][1].tolist() == [0, 31, 127, 159]


@pytest.mark.parametrize(("cells", "side"), [((14, 14), 448), ((7, 7), 224), ((2, 2), 64), ((1, 1), 32)])
def test_parts_are_chosen_greedily(cells, side):
    torch.manual_seed(0)
    features = torch.rand(3, 4, *cells)
    found = part_boxes(features, (side, side))
    assert found.shape == (3, 7, 4) and (found >= 0).all() and (found <= side - 1).all()
    for image in range(3):
        expected = []
        for (sizes, boxes), count in zip(_windows(cells, (side, side)), (2, 3, 2), strict=True):
            heat = features[image].sum(0)
            scores = [
                float(heat[r : r + h, c : c + w].mean())
                for h, w in sizes
                for r in range(cells[0] - h + 1)
                for c in range(cells[1] - w + 1)
            ]
            left, chosen = sorted(range(len(scores)), key=lambda i: -scores[i]), []
            while left and len(chosen) < count:
                best = left.pop(0)
                chosen.append(best)
                left = [i for i in left if _overlap(boxes[best].tolist(), boxes[i].tolist()) <= 0.25]
            chosen += [chosen[-1]] * (count - len(chosen))
            expected += [boxes[i].tolist() for i in chosen]
        assert found[image].tolist() == expected


def _overlap(a: list[float], b: list[float]) -> float:
    height = min(a[2], b[2]) - max(a[0], b[0]) + 1
    width = min(a[3], b[3]) - max(a[1], b[1]) + 1
    common = max(0, height) * max(0, width)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return common / (sum(areas) - common)


def test_an_object_is_looked_at_closely():
    """The pooled vector of MMAL-Net is that of what lies in the object's box, at the size of the image."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone="resnet18", pretrained=False), 3, task="mmal_net").eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        found = model.pool(images)
        for image in range(2):
            top, left, bottom, right = object_boxes(found.mask, (96, 96))[image].int().tolist()
            part = images[image : image + 1, :, top : bottom + 1, left : right + 1]
            closely = F.interpolate(part, (96, 96), mode="bilinear", align_corners=True)
            expected = model.backbone(closely).mean((2, 3))[0]
            torch.testing.assert_close(found.pooled[image], expected, atol=1e-4, rtol=1e-4)
    assert found.area.min() > 0 and found.area.max() < 1
