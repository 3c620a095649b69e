"""Normalisation layers in place of a published network's BatchNorm."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpcn_dist.runtime.errors import UserError

GROUPS = 32


def batch_norms(net: nn.Module) -> list[nn.Module]:
    """All BatchNorm layers of ``net``, whatever their variant."""
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def freeze(net: nn.Module) -> None:
    """Let no BatchNorm layer of ``net`` learn its scales and shifts."""
    for layer in batch_norms(net):
        layer.requires_grad_(False)


def replace_norms(net: nn.Module, norm: str) -> nn.Module:
    """``net`` with the normalisation that ``model.norm`` names; changes ``net`` in place.

    Layers keep their names and affine parameters, hence the initialisation that their authors gave them. For
    ``"frozen_batch"`` only the affine parameters are frozen here: the layers must be held in evaluation mode, too.

    Raises:
        UserError: ``net`` has no BatchNorm to replace.
    """
    if norm == "batch":
        return net
    if not batch_norms(net):
        reason = "this backbone has no BatchNorm to replace"
        raise UserError("model.norm", norm, reason, "use batch, which leaves its layers alone")
    if norm == "sync_batch":
        from timm.layers.norm_act import convert_sync_batchnorm  # here alone, as it takes half a second

        return convert_sync_batchnorm(net)
    if norm == "frozen_batch":
        freeze(net)
        return net
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            net.set_submodule(name, _group_norm(layer))
    return net


def _group_norm(layer: Any) -> nn.Module:
    # Where 32 groups do not divide the channels: the most groups that divide both.
    groups = math.gcd(GROUPS, layer.num_features)
    norm = nn.GroupNorm(groups, layer.num_features, eps=layer.eps, affine=layer.affine)
    if layer.affine:
        norm.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    # timm's BatchNormAct2d holds the dropout and the activation that follow it.
    following = list(layer.children())
    return nn.Sequential(norm, *following) if following else norm
