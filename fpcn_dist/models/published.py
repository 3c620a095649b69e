"""Networks by name: which library has one, and how its published weights want to be shown images.

Both libraries are imported where a network of theirs is meant; no network is built.
"""

from __future__ import annotations

import difflib
import functools
from typing import Literal, NamedTuple

from fpcn_dist.recipe.preprocessing import IMAGENET, Preprocessing
from fpcn_dist.runtime.errors import UserError, nearest

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
"""torchvision's, though timm has networks of the same names."""

ALIASES = {"mobilenet_v1": "mobilenetv1_100"}
"""Names of this project for networks of timm."""

_TORCHVISION = "torchvision/"
"""Before a name: torchvision's network, though timm has one of the same name."""


class Network(NamedTuple):
    """A network of a library.

    Attributes:
        library: who has it; "own" is this project.
        name: what the library calls it.
    """

    library: Literal["torchvision", "timm", "own"]
    name: str

    @property
    def architecture(self) -> tuple[str, str]:
        """What networks have in common that take the same weights: timm's tags name weights, not networks."""
        return self.library, self.name.partition(".")[0]


class Published(NamedTuple):
    """How a network's published weights were trained.

    Attributes:
        preprocessing: how images were shown to it.
        input_size: their usual side in pixels; ``None`` where there are no such weights.
    """

    preprocessing: Preprocessing
    input_size: int | None


@functools.cache  # to list the networks of timm takes a twentieth of a second
def find_network(name: str) -> Network:
    """The network that ``model.backbone`` names.

    Args:
        name: one of :data:`RESNETS` or :data:`ALIASES`; "lenet"; a model of timm, with or without a tag; a classifier
            of torchvision whose name timm does not have, or any with "torchvision/" before its name.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name in RESNETS:
        return Network("torchvision", name)
    if name == "lenet":
        return Network("own", name)
    import timm
    import torchvision

    timm_name = ALIASES.get(name, name)
    timms = {*timm.list_models(), *timm.list_pretrained()}
    if timm_name in timms:
        return Network("timm", timm_name)
    torchvisions = torchvision.models.list_models(module=torchvision.models)
    short = name.removeprefix(_TORCHVISION)
    if short in torchvisions:
        return Network("torchvision", short)
    close = difflib.get_close_matches(short, [*RESNETS, *ALIASES, "lenet", *torchvisions, *timms], n=1)
    reason = "there is no such network in torchvision or timm"
    raise UserError("model.backbone", name, reason, nearest(short, close or RESNETS))


def published(name: str) -> Published:
    """How the weights of a network were trained: timm's ``pretrained_cfg``, or the transforms of torchvision's weights.

    Raises:
        UserError: see :func:`find_network`.
    """
    library, name = find_network(name)
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        assert config is not None
        values = {"mean": config.mean, "std": config.std, "interpolation": config.interpolation}
        return Published(Preprocessing.recorded(values), min(config.input_size[1:]))
    if library == "torchvision":
        import torchvision

        sets = torchvision.models.get_model_weights(name).__members__
        # As weights.torchvision_weights, which takes none of the few networks whose first set is another one.
        shown = (sets.get("IMAGENET1K_V1") or next(iter(sets.values()))).transforms()
        values = {"mean": tuple(shown.mean), "std": tuple(shown.std), "interpolation": shown.interpolation.value}
        return Published(Preprocessing.recorded(values), min(shown.crop_size))
    return Published(IMAGENET, None)
