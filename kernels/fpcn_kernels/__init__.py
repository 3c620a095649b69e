"""The two operations that FPCN adds to a backbone: pooling inside the region that the network finds by itself, and the
classification loss over pairs of images of a batch. docs/kernels.md derives both, with their gradients."""

from fpcn_kernels.pairs.head import PairHead
from fpcn_kernels.pairs.operator import pair_contrast
from fpcn_kernels.pooling.operator import MaskedPool, masked_pool

__all__ = ["MaskedPool", "PairHead", "masked_pool", "pair_contrast"]
