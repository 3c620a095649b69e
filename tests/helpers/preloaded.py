"""Imported once by the process from which ranks and commands are forked: what they would spend seconds to import."""

import gc

import timm  # noqa: F401
import torch._dynamo  # noqa: F401
import torchvision  # noqa: F401

import fpcn_dist.runs.report.figures
import fpcn_dist.training.loop  # noqa: F401

# Else each of the forked processes would look through all of it, and so copy it.
gc.freeze()
