"""The parameters that classify a pair of images."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class PairHead(NamedTuple):
    """The MLP of equation 6 and the classifier of equations 8 and 9: C channels, D hidden units, K classes.

    Attributes:
        fuse_in_weight, fuse_in_bias: W_in [D, 2C] on the concatenation of both image vectors, b_in [D].
        fuse_out_weight, fuse_out_bias: W_out [C, D], b_out [C].
        classifier_weight, classifier_bias: W_cls [K, C], b_cls [K].
    """

    fuse_in_weight: Tensor
    fuse_in_bias: Tensor
    fuse_out_weight: Tensor
    fuse_out_bias: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor

    @classmethod
    def of(cls, fuse_in: nn.Linear, fuse_out: nn.Linear, classifier: nn.Linear) -> PairHead:
        """The parameters of three layers, which all have a bias."""
        return cls(*(t for layer in (fuse_in, fuse_out, classifier) for t in (layer.weight, layer.bias)))
