"""Section ``data.augment`` of a recipe: what training views change (docs/augmentation.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, model_validator

from fpcn_dist.recipe.section import Schema

Range = Annotated[tuple[float, float], PlainSerializer(list)]
"""Least and largest value; a list in files, so that it compares equal after a detour through JSON."""
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Deviation = Annotated[float, Field(ge=0.0)]

OF_BATCHES = ("mixup", "cutmix", "region")
"""Fields that change what a batch shows of an image and not its view."""


class AugmentConfig(Schema):
    """What training views show beside crop and flip. Evaluation and prediction know none of it."""

    random_resized_crop: Range | None = None
    """Least and largest share of the image's area that a view shows, scaled to the crop (0.08 1.0 for ImageNet); null
    cuts a crop of the usual scale."""
    ratio: Range = (3 / 4, 4 / 3)
    """Least and largest width of a random resized crop over its height."""
    brightness: Deviation = 0.0
    """Brightness is multiplied by a factor from max(0, 1 - brightness) to 1 + brightness."""
    contrast: Deviation = 0.0
    """The same for the distance of colours to the view's mean grey."""
    saturation: Deviation = 0.0
    """The same for the distance of colours to their own grey."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Hues are turned by up to this share of the circle of hues, either way."""
    policy: Literal["none", "trivial", "rand"] = "none"
    """TrivialAugmentWide (one operation of any magnitude), or RandAugment (two of magnitude 9 of 31)."""
    erasing: Probability = 0.0
    """Probability that a rectangle of 2 to 33 % of the view is blackened."""
    mixup: Annotated[float, Field(ge=0.0)] = 0.0
    """Alpha of the Beta distribution of shares that two images are blended with; 0: not at all."""
    cutmix: Annotated[float, Field(ge=0.0)] = 0.0
    """Alpha of the Beta distribution of areas that an image keeps where a box shows another one; 0: not at all. With
    mixup, too, each step does one of both."""

    region: Literal["none", "crop", "drop"] = "none"
    """Every other visit of an image is cut to the region that FPCN found at the visit before (crop), or shows what is
    left without it (drop)."""

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes_views(self) -> bool:
        """Whether a view is more than a crop of the usual scale, mirrored or not: by its own numbers alone."""
        usual = AugmentConfig()
        return self != usual.changed(**{name: getattr(self, name) for name in OF_BATCHES})

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if self.random_resized_crop is not None:
            low, high = self.random_resized_crop
            if not 0 < low <= high <= 1:
                raise ValueError(f"random_resized_crop {low} {high} is no range of shares; use 0.08 1.0, for example")
        low, high = self.ratio
        if not 0 < low <= high:
            raise ValueError(f"ratio {low} {high} is no range above 0; use 0.75 1.3333, for example")
        return self
