"""Distributed training of FPCN, the feature-positioning contrast network, for fine-grained images."""

__version__ = "0.1.0"
