"""The networks: FPCN, its baseline, and those that it is compared with, over any backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fpcn_dist.models.backbones import build_backbone
from fpcn_dist.models.base import Backbone
from fpcn_dist.models.classifier import Classifier
from fpcn_dist.models.compared.bilinear_cnn import BilinearCNN
from fpcn_dist.models.compared.mmal_net import MMALNet
from fpcn_dist.models.compared.pca_net import PCANet
from fpcn_dist.models.fpcn import FPCN
from fpcn_dist.recipe.schema import ModelConfig

__all__ = [
    "CLASS_TOKEN",
    "FPCN",
    "NETWORKS",
    "Backbone",
    "BilinearCNN",
    "Classifier",
    "MMALNet",
    "Network",
    "PCANet",
    "build_backbone",
    "build_model",
    "knows_token_maps",
]


class Network(NamedTuple):
    """The network that a task trains.

    Attributes:
        kind: its class.
        build: makes one from a recipe's section ``model`` and the number of classes.
        has_onnx_form: whether :mod:`fpcn_dist.deploy.onnx_graph` can write its forward pass in ONNX's operators.
    """

    kind: type[Classifier]
    build: Callable[[ModelConfig, int], Classifier]
    has_onnx_form: bool = False


def _fpcn(config: ModelConfig, num_classes: int) -> FPCN:
    return FPCN(num_classes=num_classes, **config.model_dump())


def _classifier(config: ModelConfig, num_classes: int) -> Classifier:
    own = config.model_dump(include={"pretrained", "norm", "drop_path"})
    return Classifier(config.backbone, num_classes, **own)


NETWORKS: dict[str, Network] = {
    "contrast": Network(FPCN, _fpcn, has_onnx_form=True),
    "classify": Network(Classifier, _classifier, has_onnx_form=True),
    "distill": Network(Classifier, _classifier, has_onnx_form=True),
    "bilinear_cnn": Network(BilinearCNN, BilinearCNN),
    "pca_net": Network(PCANet, PCANet),
    "mmal_net": Network(MMALNet, MMALNet),
}
"""The network of each task of :data:`fpcn_dist.recipe.schema.Task`."""


CLASS_TOKEN = "dates from when networks of tokens were reduced to one token; averaged, they would give other logits"
"""Why older models and checkpoints of such networks are refused."""


def knows_token_maps(model: Mapping[str, Any]) -> bool:
    """Whether a written section ``model`` is as young as the maps of tokens: ``drop_path`` came with them."""
    return "drop_path" in model


def build_model(config: ModelConfig, num_classes: int, *, task: str) -> Classifier:
    """The network of a recipe, as :data:`NETWORKS` has it for ``task``.

    Raises:
        UserError: see the classes.
    """
    return NETWORKS[task].build(config, num_classes)
