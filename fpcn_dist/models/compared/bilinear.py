"""Bilinear pooling: products of all pairs of channels, averaged over the cells of the map.

Legend: B images, C channels of one map and M of the other, P = H x W cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_OFFSET = 1e-5
"""Under the square root, whose slope at 0 is infinite."""


def bilinear_pool(first_BCP: Tensor, second_BMP: Tensor) -> Tensor:
    """Two maps of the same cells to one vector [B, C M] of length 1.

        X = first second^T / P,    X <- sign(X) sqrt(|X| + 1e-5),    X <- X / |X|

    Lin et al., "Bilinear CNN models for fine-grained visual recognition", section 3.
    """
    product_BD = torch.bmm(first_BCP, second_BMP.transpose(1, 2)).flatten(1) / first_BCP.shape[2]
    return F.normalize(product_BD.sign() * (product_BD.abs() + _OFFSET).sqrt())
