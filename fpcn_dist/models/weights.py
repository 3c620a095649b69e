"""Pretrained weights: from a file or a run, or from the hubs of torchvision and timm where there is a network."""

from __future__ import annotations

import contextlib
import functools
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
from torch import Tensor, nn

from fpcn_dist.models.packaged import in_names_of, packaged_hint
from fpcn_dist.runtime.errors import UserError

MODEL_FILE = "model.safetensors"
"""Name of the weights in a folder of this project."""

NETWORK_TIMEOUT = 5.0
"""Seconds that a hub may take to answer before it counts as out of reach."""

_WAYS_OUT = "give the path of a .pth or .safetensors file, or false to train from scratch"

_OWN = ("backbone.net.", "ema/module.backbone.net.", "weights/model.backbone.net.")
"""Where the backbone lies in what this project writes: in a model's file, and in a checkpoint, whose moving average, if
it has one, is what becomes the model (:mod:`fpcn_dist.runs.checkpoint`)."""


def load_file(net: nn.Module, path: str | Path, ignored: Sequence[str] = ()) -> None:
    """Load a weights file into ``net``: torchvision's, timm's, a package's, or a model or checkpoint of this project.

    Args:
        net: whose state dict the file must match, but for counters of BatchNorm batches.
        path: .safetensors, or anything that ``torch.load`` reads without running code from it; or a folder of this
            project with such a model in it.
        ignored: names of modules (a classifier) that the file may hold and ``net`` lacks.

    Raises:
        UserError: no such file, not a weights file, or the weights of another network.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / MODEL_FILE
    weights = in_names_of(net, _own_backbone(_read(path)))
    foreign = tuple(f"{name}." for name in ignored)
    weights = {key: value for key, value in weights.items() if not key.startswith(foreign)}
    expected = net.state_dict()
    problems = {
        "missing": [key for key in expected.keys() - weights.keys() if not key.endswith("num_batches_tracked")],
        "unexpected": list(weights.keys() - expected.keys()),
        "reshaped": [key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape],
    }
    if any(problems.values()):
        found = [f"{len(keys)} {kind} (such as {min(keys)})" for kind, keys in problems.items() if keys]
        raise UserError(
            "model.pretrained",
            path,
            f"these are the weights of another network: {', '.join(found)}",
            "give a file of this backbone, or set model.backbone to the one that the file was made for",
        )
    net.load_state_dict(weights, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError("model.pretrained", path, "there is no such file", _WAYS_OUT)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise anything
        raise UserError("model.pretrained", path, "this is not a readable weights file", _WAYS_OUT) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError("model.pretrained", path, "this file holds no state dict of tensors", _WAYS_OUT)
    return content


def _own_backbone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part where ``weights`` are a whole model of this project, else all of them."""
    for prefix in _OWN:
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if own:
            return own
    return weights


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """ImageNet weights of a torchvision model, from its cache or the hub: the first set that was published, as the
    released code takes.

    Raises:
        UserError: nobody published weights for the usual image size, or they are not in the cache and the hub is out
            of reach.
    """
    import torchvision

    published = torchvision.models.get_model_weights(name).__members__.get("IMAGENET1K_V1")
    if published is None:
        raise _unpublished(name)
    url = published.url
    cached = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    with _hub(url, _WAYS_OUT):
        if not cached.exists():
            _reach(url)
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, weights_only=True)


def timm_model(name: str, *, published_weights: bool) -> nn.Module:
    """A timm model without its classifier; with its published weights, from timm's cache or the hub, if asked for.

    Raises:
        UserError: nobody published weights, or they are not in the cache and the hub is out of reach.
    """
    import timm

    create = functools.partial(timm.create_model, name, num_classes=0, global_pool="")
    if not published_weights:
        return create()
    published = timm.get_pretrained_cfg(name)
    repository = published.hf_hub_id if published else None
    if not repository:
        raise _unpublished(name)
    url = f"{huggingface_hub.constants.ENDPOINT}/{repository}"
    cached = huggingface_hub.try_to_load_from_cache(repository, "model.safetensors")
    with _hub(url, packaged_hint(name) + _WAYS_OUT):
        # The hub's client retries for most of a minute without a network, even where the cache holds the weights.
        if isinstance(cached, str):
            return create(pretrained=True, pretrained_cfg_overlay={"file": cached, "custom_load": False})
        _reach(url)
        return create(pretrained=True)


def _unpublished(name: str) -> UserError:
    return UserError("model.pretrained", True, f"there are no published weights for {name}", _WAYS_OUT)


def _reach(url: str) -> None:
    """Raise an OSError soon, before anything is written, unless a server answers at ``url``."""
    with contextlib.suppress(urllib.error.HTTPError):  # an answer too
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=NETWORK_TIMEOUT).close()


@contextlib.contextmanager
def _hub(url: str, ways_out: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each hub's client has its own exceptions
        raise UserError(
            "model.pretrained", True, f"the weights could not be fetched from {url} ({error})", ways_out
        ) from error
