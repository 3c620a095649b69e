"""Views by FPCN's own region: the mask of an image's last visit chooses what its next one shows, in training alone.

Visits with an even view number show the image as it was drawn, and their mask is remembered as a box; visits with an
odd one are cut to that box, or show what is left without it (attention cropping and dropping, Hu and Qi 2019, by the
region of eq. 3 in place of attention maps). So no box is found inside a box, and a step remains a function of the state
of the training.

Legend: B images of this rank; a box is top, left, bottom and right, as shares of the height and width of a view, or of
the whole resized image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpcn_dist.data.batch import Batch
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.collectives import Group, all_gather

_LEAST = 0.25
"""Least side of a box, as a share of the view: what is smaller would be magnified more than four times."""
_DROPPED = 0.5
"""Largest share of a view that is dropped."""


class LastRegions(nn.Module):
    """Where the region of each image was when it was last shown as it was drawn.

    The boxes are a buffer, so that checkpoints hold them, and the same on all ranks.

    Args:
        images: of the whole data set.
        data: sizes, and whether to crop or to drop.
        group: all ranks, or ``None`` for one.

    Buffers:
        boxes: [images, 4] float32, shares of the whole resized image; NaN where there is none yet.
    """

    boxes: Tensor

    def __init__(self, images: int, data: DataConfig, group: Group | None) -> None:
        super().__init__()
        self._data, self._group = data, group
        self.register_buffer("boxes", torch.full((images, 4), torch.nan))

    @torch.no_grad()
    def shown(self, batch: Batch) -> Tensor:
        """The images [B, 3, H, W] of a batch, those of odd views cut to their boxes or without them."""
        origin_B2, side_B2 = self._window(batch.crops)
        box_B22 = (self.boxes[batch.image_ids].view(-1, 2, 2) - origin_B2[:, None]) / side_B2[:, None]
        box_B22 = _mirrored(box_B22, batch.crops[:, 2]).clamp(0, 1)
        low_B2, high_B2 = box_B22.unbind(1)
        known_B = (batch.view_ids % 2 == 1) & (high_B2 - low_B2 > 0).all(dim=1)  # which NaN is not
        if self._data.augment.region == "drop":
            return _dropped(batch.images, low_B2, high_B2, known_B)
        half_B2 = ((high_B2 - low_B2) / 2).clamp(min=_LEAST / 2)
        centre_B2 = ((low_B2 + high_B2) / 2).clamp(half_B2, 1 - half_B2)
        return torch.where(_like(known_B, batch.images), _magnified(batch.images, centre_B2, half_B2), batch.images)

    @torch.no_grad()
    def note(self, batch: Batch, mask: Tensor) -> None:
        """Remember the masks [B, h, w] of even views. Collective.

        A box is the mean place of the mask's cells, and the square root of three times their standard deviations to
        either side: the edges of a region that is a rectangle, and hardly moved by single cells elsewhere.
        """
        low_high = [_extent(mask.sum(dim=dim)) for dim in (2, 1)]  # over rows, then over columns
        box_B22 = _mirrored(torch.stack(low_high, dim=2), batch.crops[:, 2])
        origin_B2, side_B2 = self._window(batch.crops)
        box_B4 = (origin_B2[:, None] + side_B2[:, None] * box_B22).flatten(1)
        box_B4 = torch.where((batch.view_ids % 2 == 0)[:, None], box_B4, self.boxes[batch.image_ids])
        ids_N = all_gather(batch.image_ids, self._group)
        self.boxes[ids_N] = all_gather(box_B4.float(), self._group)

    def _window(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Upper left corner and sides, [B, 2] each, of views in a square frame, as shares of it."""
        scale_B, ratio_B = crops[:, 3], crops[:, 4]
        resized_B2 = torch.stack([scale_B / ratio_B, scale_B * ratio_B], dim=1).sqrt().clamp(max=1)
        side_B2 = torch.where(scale_B[:, None] > 0, resized_B2, self._data.crop / self._data.resize)
        return crops[:, :2] * (1 - side_B2), side_B2


def _mirrored(box_B22: Tensor, flip_B: Tensor) -> Tensor:
    """Boxes of mirrored views as they are in the image, and the other way round: [B, (low, high), (down, right)]."""
    mirrored_B22 = torch.stack([box_B22[..., 0], 1 - box_B22[..., 1].flip(1)], dim=2)
    return torch.where((flip_B > 0)[:, None, None], mirrored_B22, box_B22)


def _extent(counts_Bn: Tensor) -> Tensor:
    """Where cells lie along one axis, [B, 2] in shares of it; NaN where there are none."""
    counts_Bn, cells = counts_Bn.double(), counts_Bn.shape[1]
    place_n = torch.arange(cells, dtype=torch.float64, device=counts_Bn.device) + 0.5
    total_B = counts_Bn.sum(dim=1)
    mean_B = counts_Bn @ place_n / total_B
    # A cell is no point: its own variance is a twelfth.
    variance_B = (counts_Bn * (place_n - mean_B[:, None]).square()).sum(dim=1) / total_B + 1 / 12
    half_B = (3 * variance_B).sqrt()
    return (torch.stack([mean_B - half_B, mean_B + half_B], dim=1) / cells).clamp(0, 1)


def _magnified(images: Tensor, centre_B2: Tensor, half_B2: Tensor) -> Tensor:
    """The parts of images around ``centre_B2``, [B, (down, right)], as large as the images."""
    theta_B23 = images.new_zeros(len(images), 2, 3)
    for row, axis in enumerate((1, 0)):  # affine_grid counts across first, from -1 to 1
        theta_B23[:, row, row] = (2 * half_B2[:, axis]).to(images)
        theta_B23[:, row, 2] = (2 * centre_B2[:, axis] - 1).to(images)
    grid = F.affine_grid(theta_B23, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _dropped(images: Tensor, low_B2: Tensor, high_B2: Tensor, known_B: Tensor) -> Tensor:
    """Images that are 0, the mean colour, inside their boxes, where these are not most of the view."""
    inside = []
    for axis, length in enumerate(images.shape[2:]):
        place_n = (torch.arange(length, device=images.device) + 0.5) / length
        inside.append((place_n >= low_B2[:, axis, None]) & (place_n <= high_B2[:, axis, None]))
    small_B = known_B & ((high_B2 - low_B2).prod(dim=1) <= _DROPPED)
    box_BHW = inside[0][:, :, None] & inside[1][:, None] & small_B[:, None, None]
    return images.masked_fill(box_BHW[:, None], 0)


def _like(flag_B: Tensor, images: Tensor) -> Tensor:
    return flag_B.view(-1, *[1] * (images.ndim - 1))
