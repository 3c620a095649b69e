"""How deep in a network a parameter lies: what freezing by depth and layer-wise learning rates go by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def layer_depths(net: nn.Module) -> tuple[dict[str, int], int]:
    """The layer group of each parameter of a backbone's network, counted from the images on.

    Group 0 is the stem. Networks of timm say themselves what their groups are (``group_matcher``); what they leave to
    none, as a last convolution before the pooling, counts to the classifier's group. The groups of any other network
    are its layers in turn, inside its ``nn.Sequential``; a normalisation belongs to the layer before it.

    Returns:
        The group of each parameter by its name in ``net``, and that of whatever follows the backbone.
    """
    names = [name for name, _ in net.named_parameters()]
    if hasattr(net, "group_matcher"):
        from timm.models._manipulate import group_with_matcher  # here alone, as it takes half a second

        matcher: Any = net.group_matcher  # type: ignore[assignment]  # a method, which nn.Module hides
        named = [(name, None) for name in (*names, _HEAD)]
        depths: Any = group_with_matcher(iter(named), matcher(), reverse=True)
        return {name: depths[name] for name in names}, depths[_HEAD]
    layers = list(_layers(net))
    first = [name for name in names if not any(name.startswith(f"{layer}.") for layer in layers)]
    depths, depth = dict.fromkeys(first, 0), -1
    for layer in layers:
        inside = {name: p for name, p in net.named_parameters() if name.startswith(f"{layer}.")}
        normalises = all(p.ndim == 1 for p in inside.values())
        depth += 0 if normalises and depth >= 0 else 1
        depths |= dict.fromkeys(inside, depth)
    return depths, depth + 1


_HEAD = "head."
"""The name of no parameter, and in none of timm's patterns for backbones."""


def _layers(net: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the modules with parameters in order, looking into ``nn.Sequential`` and the network itself alone."""
    for name, child in net.named_children():
        if type(child) is nn.Sequential:
            yield from _layers(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}"
