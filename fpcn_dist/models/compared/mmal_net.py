"""MMAL-Net, the multi-branch and multi-scale attention network (Zhang et al., 2021): the image, the object in it, and
parts of the object, through one network.

Everything stays on the device; boxes differ from image to image, but their number does not.

Legend: B images, C channels, H x W cells of the feature map, S windows, N boxes or parts, K classes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fpcn_kernels import MaskedPool, masked_pool
from torch import Tensor

from fpcn_dist.models.backbones import ResNet, build_backbone
from fpcn_dist.models.classifier import Classifier
from fpcn_dist.recipe.schema import ModelConfig
from fpcn_dist.runtime.errors import UserError

WINDOWS = (
    ((4, 4), (3, 5), (5, 3)),
    ((6, 6), (5, 7), (7, 5)),
    ((8, 8), (6, 10), (10, 6), (7, 9), (9, 7), (7, 10), (10, 7)),
)
"""Heights and widths of the part windows, in cells of a 14 x 14 map, in three groups (CUB in the published code)."""
PARTS = (2, 3, 2)
"""Parts that are taken from each group."""
_MAP = 14
_MOST_OVERLAP = 0.25
"""Intersection over union that two parts of a group may have."""


class Branches(NamedTuple):
    """What the network sees of a batch.

    Attributes:
        raw, object: [B, C] pooled features of the image and of the object.
        parts: [B, N, C] of the parts, if they were asked for.
        mask: [B, H, W] 1 in the object, 0 elsewhere.
    """

    raw: Tensor
    object: Tensor
    parts: Tensor | None
    mask: Tensor


class MMALNet(Classifier):
    """A ResNet and one linear layer, shared by all branches; a single image is classified by its object.

    Args:
        config: ``backbone`` is one of torchvision's ResNets ("resnet50" as published); ``dropout`` acts on pooled
            features in training (published: 0.5); ``pretrained`` and ``norm`` as everywhere.
        num_classes: K.

    Raises:
        UserError: another backbone.
    """

    backbone: ResNet

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        backbone = build_backbone(
            config.backbone, pretrained=config.pretrained, norm=config.norm, drop_path=config.drop_path
        )
        if not isinstance(backbone, ResNet):
            reason = f"it is not known which block of {config.backbone} comes before the last, which MMAL-Net needs"
            raise UserError("model.backbone", config.backbone, reason, "use resnet18, resnet34, resnet50 or resnet101")
        super().__init__(backbone, num_classes)
        self.dropout = config.dropout

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H', W'] to pooled features [B, C] of the whole, and the object's mask [B, H, W]."""
        features, before = self.backbone.forward_with_companion(images)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            mask = masked_pool(features.detach(), region="largest", companion=before.detach()).mask
        return _mean(features), mask

    def branches(self, images: Tensor, *, parts: bool) -> Branches:
        """All that the network sees; no gradient flows from a branch into the boxes that another has found."""
        raw, mask = self.raw(images)
        side = images.shape[2:]
        objects = crop(images, object_boxes(mask, side)[:, None], side).squeeze(1)
        features = self.backbone(objects)
        if not parts:
            return Branches(raw, _mean(features), None, mask)
        cut = crop(objects, part_boxes(features.detach(), side), (side[0] // 2, side[1] // 2))
        pooled = _mean(self.backbone(cut.flatten(0, 1))).unflatten(0, cut.shape[:2])
        return Branches(raw, _mean(features), pooled, mask)

    def pool(self, images: Tensor) -> MaskedPool:
        """Images [B, 3, H', W'] to pooled features [B, C] of their objects, and where in the image these are."""
        found = self.branches(images, parts=False)
        return MaskedPool(found.object, found.mask, found.mask.mean((1, 2)))


def _mean(features_BCHW: Tensor) -> Tensor:
    return features_BCHW.mean((2, 3), dtype=torch.promote_types(features_BCHW.dtype, torch.float32))


@torch.no_grad()
def object_boxes(mask_BHW: Tensor, side: tuple[int, ...]) -> Tensor:
    """Pixels [B, 4] (first row, first column, last row, last column) around the ones of each mask.

    Of cells r0 to r1 - 1 of stride s: pixels s r0 - 1 (but not below 0) to s r1 - 1, as in the published code.

    Args:
        mask_BHW: [B, H, W]; no mask is empty.
        side: height and width of the image in pixels.
    """
    ends = []
    for axis, pixels in ((1, side[0]), (2, side[1])):
        cells_BL = (mask_BHW == 1).any(3 - axis)
        length = cells_BL.shape[1]
        index_L = torch.arange(length, device=mask_BHW.device)
        first = index_L.where(cells_BL, length).amin(1)
        last = index_L.where(cells_BL, -1).amax(1)
        stride = pixels / length
        ends.append(((first * stride - 1).clamp(min=0), (last + 1) * stride - 1))
    (top, bottom), (left, right) = ends
    return torch.stack([top, left, bottom, right], dim=1).float()


def crop(images: Tensor, boxes_BN4: Tensor, size: tuple[int, ...]) -> Tensor:
    """What is inside the boxes [B, N, 4] of each image, resampled bilinearly to ``size``: [B, N, 3, *size].

    The corners of a box and of its result coincide.
    """
    axes = []
    for axis, pixels in enumerate(images.shape[2:]):
        first, last = boxes_BN4[..., axis, None], boxes_BN4[..., axis + 2, None]
        along = torch.linspace(0, 1, size[axis], device=images.device)
        axes.append(2 * (first + (last - first) * along) / max(1, pixels - 1) - 1)
    rows_BNh, columns_BNw = axes
    shape = (*boxes_BN4.shape[:2], *size)
    grid = torch.stack([columns_BNw[:, :, None, :].expand(shape), rows_BNh[..., None].expand(shape)], dim=-1)
    sampled = F.grid_sample(images, grid.flatten(1, 2).to(images.dtype), padding_mode="border", align_corners=True)
    return sampled.unflatten(2, (-1, size[0])).transpose(1, 2)


@torch.no_grad()
def part_boxes(features_BCHW: Tensor, side: tuple[int, ...]) -> Tensor:
    """Pixels [B, N, 4] of the windows in which the channel sum is greatest on average.

    In each group of sizes, greedily: the best window, then the best of those that overlap none of the chosen ones by
    more than a quarter. Where none is left, the last one again.
    """
    sum_B1HW = features_BCHW.float().sum(1, keepdim=True)
    groups = _windows(tuple(features_BCHW.shape[2:]), tuple(side))
    chosen = []
    for (sizes, boxes_S4), count in zip(groups, PARTS, strict=True):
        boxes_S4 = boxes_S4.to(features_BCHW.device)
        score_BS = torch.cat([F.avg_pool2d(sum_B1HW, size, 1).flatten(1) for size in sizes], dim=1)
        chosen.append(boxes_S4[_greedy(score_BS, _overlap(boxes_S4), count)])
    return torch.cat(chosen, dim=1)


@functools.lru_cache(maxsize=16)
def _windows(cells: tuple[int, int], side: tuple[int, int]) -> list[tuple[list[tuple[int, int]], Tensor]]:
    """For each group, its window sizes in cells (those of a 14 x 14 map, to scale), and all windows, pixels [S, 4]."""
    groups = []
    for sizes in WINDOWS:
        scaled = [tuple(max(1, round(n * c / _MAP)) for n, c in zip(size, cells, strict=True)) for size in sizes]
        scaled = list(dict.fromkeys((min(h, cells[0]), min(w, cells[1])) for h, w in scaled))
        boxes = [
            (top, left, top + height, left + width)
            for height, width in scaled
            for top in range(cells[0] - height + 1)
            for left in range(cells[1] - width + 1)
        ]
        stride = torch.tensor([side[0] / cells[0], side[1] / cells[1]] * 2)
        groups.append((scaled, (torch.tensor(boxes) * stride - 1).clamp(min=0)))
    return groups


def _overlap(boxes_S4: Tensor) -> Tensor:
    """Intersection over union [S, S] of boxes whose last row and column belong to them."""
    first = torch.maximum(boxes_S4[:, None, :2], boxes_S4[None, :, :2])
    last = torch.minimum(boxes_S4[:, None, 2:], boxes_S4[None, :, 2:])
    common_SS = (last - first + 1).clamp(min=0).prod(2)
    area_S = (boxes_S4[:, 2:] - boxes_S4[:, :2] + 1).prod(1)
    return common_SS / (area_S[:, None] + area_S[None, :] - common_SS)


def _greedy(score_BS: Tensor, overlap_SS: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the chosen windows."""
    picks: list[Tensor] = []
    for _ in range(count):
        best_B = score_BS.argmax(1)
        if picks:
            none_left_B = score_BS.amax(1) == -torch.inf
            best_B = torch.where(none_left_B, picks[-1], best_B)
        picks.append(best_B)
        itself_BS = F.one_hot(best_B, score_BS.shape[1]).bool()
        score_BS = score_BS.masked_fill((overlap_SS[best_B] > _MOST_OVERLAP) | itself_BS, -torch.inf)
    return torch.stack(picks, dim=1)
