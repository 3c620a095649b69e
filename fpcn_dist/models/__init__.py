"""The networks: FPCN and its baseline, over any backbone."""

from fpcn_dist.models.backbones import Backbone, build_backbone
from fpcn_dist.models.fpcn import FPCN, Classifier, build_model

__all__ = ["FPCN", "Backbone", "Classifier", "build_backbone", "build_model"]
