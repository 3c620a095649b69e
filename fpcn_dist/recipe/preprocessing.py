"""How grey levels become what a network sees. It belongs to the network: its weights were trained on such images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from fpcn_dist.recipe.section import Schema

Interpolation = Literal["bilinear", "bicubic"]
_Mean = Annotated[float, Field(allow_inf_nan=False)]
_Std = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Mean = tuple[_Mean, _Mean, _Mean]
Std = tuple[_Std, _Std, _Std]


class Preprocessing(Schema):
    """The filter of the resizing and the normalisation; by default those of ImageNet's first networks."""

    mean: Mean = (0.485, 0.456, 0.406)
    """Of red, green and blue, for pixels in [0, 1]."""
    std: Std = (0.229, 0.224, 0.225)
    """Of red, green and blue, for pixels in [0, 1]."""
    interpolation: Interpolation = "bilinear"
    """Antialiased: a triangle, or Keys' cubic with a = -0.5, as Pillow and PyTorch have them."""

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Preprocessing:
        """What a recipe, model or checkpoint on the disk says; what an old one lacks was as it is by default.

        Raises:
            pydantic.ValidationError: a value is damaged.
        """
        found = {name: values.get(name) for name in cls.model_fields}
        return cls.model_validate({name: value for name, value in found.items() if value is not None})

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}, {self.interpolation}"


IMAGENET = Preprocessing()
"""Of a network that nobody has published weights of, or that starts from scratch."""
