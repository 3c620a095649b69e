"""The modes that a network is put into for a while: evaluation, and the arithmetic of autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` into evaluation mode, and each back into its own mode afterwards.

    Modes are kept per module: in a model under training, a frozen part may already be in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The arithmetic that ``train.precision`` names: "fp32" leaves everything alone, "bf16" is bfloat16 autocast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
