"""Augmentations by name: as a recipe asks for them, and as torchvision's v2 has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import io
from torchvision.transforms import v2

from fpcn_dist.recipe.schema import DataConfig

_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
_SCALE = (0.2, 1.0)

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "crop and flip alone": {},
    "fit: pad": {"fit": "pad"},
    "fit: short_side": {"fit": "short_side"},
    "random_resized_crop": {"augment": {"random_resized_crop": _SCALE}},
    "brightness, contrast, saturation": {"augment": _JITTER | {"hue": 0.0}},
    "the same and hue": {"augment": _JITTER},
    "policy: trivial": {"augment": {"policy": "trivial"}},
    "policy: rand": {"augment": {"policy": "rand"}},
    "erasing": {"augment": {"erasing": 0.25}},
    "mixup": {"augment": {"mixup": 0.2}},
    "cutmix": {"augment": {"cutmix": 1.0}},
    "many of these together": {
        "augment": _JITTER | {"random_resized_crop": _SCALE, "policy": "rand", "erasing": 0.25, "mixup": 0.2}
    },
}
"""What is changed in ``data``."""


def by_v2(config: DataConfig) -> Callable[[str | bytes], Tensor]:
    """From a path, or the bytes of an image, to a normalised view [3, crop, crop] as v2 makes it, on uint8."""
    transform = v2.Compose(
        [
            *_geometry(config),
            v2.RandomHorizontalFlip(),
            *_colours(config),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.preprocessing.mean, config.preprocessing.std),
        ]
    )
    return lambda source: transform(io.decode_image(_encoded(source), mode=io.ImageReadMode.RGB))


def _encoded(source: str | bytes) -> Tensor:
    return io.read_file(source) if isinstance(source, str) else torch.frombuffer(bytearray(source), dtype=torch.uint8)


def mixed_by_v2(config: DataConfig, num_classes: int) -> Callable[[Tensor, Tensor], Any]:
    """What mixes a batch of images and labels."""
    augment = config.augment
    if augment.mixup:
        return v2.MixUp(alpha=augment.mixup, num_classes=num_classes)
    if augment.cutmix:
        return v2.CutMix(alpha=augment.cutmix, num_classes=num_classes)
    return lambda images, labels: (images, labels)


def _geometry(config: DataConfig) -> list[Callable]:
    augment, side = config.augment, config.resize
    resizing = {"interpolation": v2.InterpolationMode(config.preprocessing.interpolation), "antialias": True}
    if augment.random_resized_crop is not None:
        scale, ratio = augment.random_resized_crop, augment.ratio
        return [v2.RandomResizedCrop(config.crop, scale, ratio, **resizing)]
    resize = {
        "squeeze": [v2.Resize((side, side), **resizing)],
        "short_side": [v2.Resize(side, **resizing)],
        "pad": [v2.Resize(None, max_size=side, **resizing), lambda image: _padded(image, side)],
    }[config.fit]
    return [*resize, v2.RandomCrop(config.crop)]


def _padded(image: Tensor, side: int) -> Tensor:
    return v2.functional.center_crop(image, [side, side])  # which pads what is smaller


def _colours(config: DataConfig) -> list[Callable]:
    augment, steps = config.augment, []
    jitter = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    if augment.policy != "none":
        steps.append(v2.TrivialAugmentWide() if augment.policy == "trivial" else v2.RandAugment())
    if augment.erasing:
        steps.append(v2.RandomErasing(augment.erasing))
    return steps
