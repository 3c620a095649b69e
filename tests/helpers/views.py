"""Views by the pixels of their crops."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fpcn_dist.data.views import CROP, Views, centre_views
from fpcn_dist.recipe.schema import DataConfig


def crop_views(crops: np.ndarray, config: DataConfig) -> Views:
    """Plain views of a square frame from [n, 3]: crop row, crop column (pixels of the resized image) and flip."""
    views = centre_views(len(crops))
    room = max(config.resize - config.crop, 1)
    views["down"], views["right"], views["flip"] = crops[:, 0] / room, crops[:, 1] / room, crops[:, 2]
    return views


def views_cut_as(crops: Tensor) -> Views:
    """Views that change nothing, cut as the ``crops`` [n, 5] of a batch."""
    views = centre_views(len(crops))
    for name, column in zip(CROP, crops.T.numpy(), strict=True):
        views[name] = column
    return views
