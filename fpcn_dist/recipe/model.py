"""Section ``model`` of a recipe: the network."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from fpcn_dist.recipe.section import Fraction, PositiveInt, Schema, truth


class ModelConfig(Schema):
    """The network: backbone, region, head."""

    backbone: str = "resnet101"
    """resnet18, 34, 50 or 101 (torchvision), mobilenet_v1, lenet, or any classifier of timm or torchvision by name
    (torchvision/NAME where timm has one of the same name, too)."""
    pretrained: bool | str = True
    """true: ImageNet weights from the hub or its cache; packaged: those of an installed Python package; a path: a
    weights file, or a run, model or checkpoint of this project with the same backbone; false: from scratch."""
    norm: Literal["batch", "sync_batch", "frozen_batch", "group"] = "batch"
    """Normalisation layers: as published, synchronised across GPUs, frozen statistics, or GroupNorm."""
    region: Literal["threshold", "largest", "none"] = "threshold"
    """Eq. 3's region: all cells above the mean, the largest connected part of them, or no mask at all."""
    companion: bool = False
    """Intersect the largest region with the mask of the previous block (the released code)."""
    theta: Fraction = 0.0
    """Eq. 3: what is kept of the features outside the region."""
    area_scale: bool = True
    """Eq. 5: multiply the masked features by alpha."""
    head: Literal["product", "gated"] = "product"
    """Eq. 8 and 9, or the released code's residual sigmoid gates with four logits per pair."""
    hidden: PositiveInt = 512
    """Width of the hidden layer of eq. 6."""
    activation: Literal["relu", "identity"] = "relu"
    """Activation of the hidden layer of eq. 6."""
    dropout: Fraction = 0.0
    """Dropout on the hidden layer (and, in the gated head and MMAL-Net, before the classifier)."""
    fuse_init: Literal["ones", "default"] = "ones"
    """Start of fuse_out: weights near 0 and bias 1, so that training starts as a plain classifier; or torch's."""
    inference: Literal["self_pair", "plain"] = "self_pair"
    """Logits of a single image: of its pair with itself, or of the plain pooled vector."""

    @field_validator("pretrained", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        return truth(value)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.companion and self.region != "largest":
            raise ValueError(f"companion needs region 'largest', not {self.region!r}; set region or drop companion")
        return self
