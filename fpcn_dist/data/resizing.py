"""The resizing on the CPU that both decoding backends share."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import interpolate

from fpcn_dist.recipe.schema import DataConfig


def resized_crop(image_HWC: Tensor, row: int, column: int, config: DataConfig) -> Tensor:
    """Resize an image, antialiased, and cut it.

    Args:
        image_HWC: uint8, of any height and width.
        row, column: the upper left corner of the crop, in pixels of the resized image.
        config: the sides of the resized image and of the crop, and the filter.

    Returns:
        [crop, crop, 3] uint8.
    """
    mode = config.preprocessing.interpolation
    image_BCHW = image_HWC.permute(2, 0, 1)[None]
    resized_BCHW = interpolate(image_BCHW, size=(config.resize,) * 2, mode=mode, antialias=True)
    return resized_BCHW[0].permute(1, 2, 0)[row : row + config.crop, column : column + config.crop]
