"""The networks: FPCN, its baseline, and those that it is compared with, over any backbone."""

from __future__ import annotations

from fpcn_dist.models.backbones import build_backbone
from fpcn_dist.models.base import Backbone
from fpcn_dist.models.classifier import Classifier
from fpcn_dist.models.compared.bilinear_cnn import BilinearCNN
from fpcn_dist.models.compared.mmal_net import MMALNet
from fpcn_dist.models.compared.pca_net import PCANet
from fpcn_dist.models.fpcn import FPCN
from fpcn_dist.recipe.schema import ModelConfig

__all__ = ["FPCN", "Backbone", "BilinearCNN", "Classifier", "MMALNet", "PCANet", "build_backbone", "build_model"]

_COMPARED = {"bilinear_cnn": BilinearCNN, "pca_net": PCANet, "mmal_net": MMALNet}


def build_model(config: ModelConfig, num_classes: int, *, task: str) -> Classifier:
    """The network of a recipe: :class:`FPCN` for the task "contrast", a compared one for the task of its name, else
    :class:`Classifier`.

    Raises:
        UserError: see the classes.
    """
    if task == "contrast":
        return FPCN(num_classes=num_classes, **config.model_dump())
    if task in _COMPARED:
        return _COMPARED[task](config, num_classes)
    return Classifier(config.backbone, num_classes, pretrained=config.pretrained, norm=config.norm)
