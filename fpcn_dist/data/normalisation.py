"""The normalisation of pixels on the device that trains."""

from __future__ import annotations

import torch
from torch import Tensor

from fpcn_dist.recipe.preprocessing import Preprocessing


class Normalisation:
    """Grey levels to the network's input, on one device."""

    def __init__(self, shown: Preprocessing, device: torch.device) -> None:
        # On the device from the start: made for each batch, they would let the host wait for the GPU.
        columns = [[255 * mean for mean in shown.mean], [1 / (255 * std) for std in shown.std]]
        self._mean_C11, self._scale_C11 = torch.tensor(columns, device=device)[..., None, None]

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 on the device to [B, 3, H, W] float32."""
        pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2)
        images_BCHW = pixels_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
        return images_BCHW.sub_(self._mean_C11).mul_(self._scale_C11)
