"""The networks: FPCN, its baseline, and those that it is compared with, over any backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fpcn_dist.models.backbones import build_backbone
from fpcn_dist.models.base import Backbone
from fpcn_dist.models.classifier import Classifier
from fpcn_dist.models.compared.bilinear_cnn import BilinearCNN
from fpcn_dist.models.compared.mmal_net import MMALNet
from fpcn_dist.models.compared.pca_net import PCANet
from fpcn_dist.models.fpcn import FPCN
from fpcn_dist.recipe.schema import ModelConfig

__all__ = [
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


def build_model(config: ModelConfig, num_classes: int, *, task: str) -> Classifier:
    """The network of a recipe, as :data:`NETWORKS` has it for ``task``.

    Raises:
        UserError: see the classes.
    """
    return NETWORKS[task].build(config, num_classes)
