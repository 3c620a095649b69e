"""The normalisation of pixels that training, evaluation, prediction and every exported model share."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
"""ImageNet mean of red, green and blue, for pixels in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""ImageNet standard deviation of red, green and blue, for pixels in [0, 1]."""


class Normalisation:
    """Grey levels to the network's input, on one device."""

    def __init__(self, device: torch.device) -> None:
        # On the device from the start: made for each batch, they would let the host wait for the GPU.
        columns = [[255 * mean for mean in MEAN], [1 / (255 * std) for std in STD]]
        self._mean_C11, self._scale_C11 = torch.tensor(columns, device=device)[..., None, None]

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 on the device to [B, 3, H, W] float32."""
        pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2)
        images_BCHW = pixels_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
        return images_BCHW.sub_(self._mean_C11).mul_(self._scale_C11)
