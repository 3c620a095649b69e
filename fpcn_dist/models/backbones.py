"""Backbones: convolutional feature extractors, from torchvision and timm by name.

Both libraries are imported where a network of theirs is built: torchvision brings torch's compiler, more than a second,
and timm half a second more, which commands and tests without such a network need not wait for.

Legend: B images, C channels and H x W cells of the feature map.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fpcn_dist.models import weights
from fpcn_dist.models.base import Backbone
from fpcn_dist.models.lenet import LeNet
from fpcn_dist.models.packaged import PACKAGED, packaged_file
from fpcn_dist.models.published import RESNETS, find_network
from fpcn_dist.models.sizes import REFUSALS, explain_refusal
from fpcn_dist.runtime.errors import UserError

Way = Callable[[Any, Tensor], Tensor]
"""How a network of timm turns images [B, 3, H', W'] into features [B, C, H, W]."""

_IMAGENET_CLASSES = 1000


def build_backbone(
    name: str, *, pretrained: bool | str = False, norm: str = "batch", drop_path: float | None = None
) -> Backbone:
    """The backbone called ``name``.

    Args:
        name: see :func:`fpcn_dist.models.published.find_network`.
        pretrained: ``True``: ImageNet weights from the hub or its cache; "packaged": those of an installed package; a
            path: a weights file of this network, its classifier included or not, or a model or checkpoint of this
            project with this backbone; ``False``: freshly initialised.
        norm: ``"batch"``: normalisation as published; ``"sync_batch"``: BatchNorm over all ranks; ``"frozen_batch"``:
            BatchNorm with its statistics and affine parameters as they were loaded; ``"group"``: GroupNorm instead.

    Raises:
        UserError: unknown name, no weights to be had, weights of another network, a network of timm without a 2-D
            feature map or of torchvision without a linear classifier, a network without BatchNorm where ``norm`` would
            replace it, GroupNorm with weights trained with BatchNorm.
    """
    if norm == "group" and pretrained:
        raise UserError(
            "model.norm",
            norm,
            "pretrained weights were trained with BatchNorm and mean nothing with GroupNorm",
            "set model.pretrained to false, or use batch, sync_batch or frozen_batch",
        )
    network = find_network(name)
    if pretrained == PACKAGED:
        pretrained = str(packaged_file(network))
    if network.library == "timm":
        return TimmNet(network.name, pretrained, norm, drop_path)
    if network.library == "torchvision" and name not in RESNETS:
        return TorchvisionNet(network.name, pretrained, norm, drop_path)
    if drop_path is not None:
        raise no_drop_path(name, drop_path)
    return LeNet(pretrained, norm) if network.library == "own" else ResNet(name, pretrained, norm)


class ResNet(Backbone):
    """torchvision's ResNet."""

    def __init__(self, name: str, pretrained: bool | str, norm: str) -> None:
        import torchvision

        resnet: torchvision.models.ResNet = getattr(torchvision.models, name)(weights=None)
        layers = OrderedDict((name, layer) for name, layer in resnet.named_children() if name not in ("avgpool", "fc"))
        net = nn.Sequential(layers)
        if isinstance(pretrained, str):
            weights.load_file(net, pretrained, ignored=["fc"])
        elif pretrained:
            net.load_state_dict(weights.torchvision_weights(name), strict=False)
        super().__init__(net, resnet.fc.in_features, norm)

    @overload
    def forward(self, images: Tensor) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, *, companion: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, images: Tensor, *, companion: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Features [B, C, H, W]; with ``companion`` also those of the block before the last, of the same shape."""
        if not companion:
            return super().forward(images)
        self._check_device(images.device)
        *stem, last_stage = self.net.children()
        *blocks, last_block = last_stage.children()
        features = images
        for module in (*stem, *blocks):
            features = module(features)
        return last_block(features), features

    def forward_with_companion(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, C, H, W], and those of the block before the last, of the same shape."""
        # A call of the module, as it is only these that ``compile`` acts on.
        return self(images, companion=True)


class TorchvisionNet(Backbone):
    """Any classifier of torchvision less its final linear layer.

    Where that layer's input is more than the pooled feature map, it is the features, [B, C, 1, 1].
    """

    def __init__(self, name: str, pretrained: bool | str, norm: str, drop_path: float | None) -> None:
        from torchvision import models

        # Of the networks that timm lacks, this one has auxiliary classifiers, normalises images in its own way, and
        # warns unless told how to initialise. A trained model is built again without pretrained weights, so no option
        # may depend on them.
        own = {"aux_logits": False, "transform_input": True, "init_weights": True}
        options = own if name == "googlenet" else {}
        net = models.get_model(name, weights=None, **options)
        if drop_path is not None:
            _drop_paths(name, net, drop_path)
        linears = [(key, layer) for key, layer in net.named_modules() if isinstance(layer, nn.Linear)]
        classifiers = [(key, layer) for key, layer in linears if layer.out_features == _IMAGENET_CLASSES]
        if not classifiers:
            raise UserError(
                "model.backbone",
                name,
                "it has no linear layer at its end, which the classifier would replace",
                "use another network, for example shufflenet_v2_x1_5",
            )
        classifier, layer = classifiers[-1]
        # These are their layers in turn, global average pooling, and one linear layer after a dropout at most.
        convolutional = (models.EfficientNet, models.MNASNet, models.MobileNetV2, models.RegNet, models.ShuffleNetV2)
        has_map = isinstance(net, (*convolutional, models.SwinTransformer))
        if has_map:
            after = ("avgpool", "fc", "classifier")
            net = nn.Sequential(
                OrderedDict(itertools.takewhile(lambda child: child[0] not in after, net.named_children()))
            )
        else:
            net.set_submodule(classifier, nn.Identity())
        if isinstance(pretrained, str):
            weights.load_file(net, pretrained, ignored=[classifier, "aux1", "aux2"])
        elif pretrained:
            net.load_state_dict(weights.torchvision_weights(name), strict=False)
        super().__init__(net, layer.in_features, norm, has_map=has_map)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, C, H, W], or [B, C, 1, 1]."""
        self._check_device(images.device)
        try:
            features = self.net(images)
        except REFUSALS as error:
            explain_refusal(self.net, nn.Module.__call__, images, self.published_side, error)
            raise
        return features if features.ndim == 4 else features[:, :, None, None]


def _drop_paths(name: str, net: nn.Module, drop_path: float) -> None:
    """Let the residual blocks of a network of torchvision drop out with a rate that rises linearly to ``drop_path``."""
    from torchvision.ops import StochasticDepth

    layers = [module for module in net.modules() if isinstance(module, StochasticDepth)]
    if not layers:
        raise no_drop_path(name, drop_path)
    for index, layer in enumerate(layers):
        layer.p = drop_path * index / max(1, len(layers) - 1)


class TimmNet(Backbone):
    """Any network of timm. Patch tokens are the cells of a map; class and register tokens are left out of it.

    Of a network without any layout the features are its class token, or the mean of its tokens without one.
    """

    net: Any

    def __init__(self, name: str, pretrained: bool | str, norm: str, drop_path: float | None) -> None:
        net = _create(name, pretrained is True, drop_path)
        _norm_before_pooling(net)
        way, features = _way(name, net)
        removed = _remove_unused(net, features)
        ends_in_tokens = way in (_tokens, _raw_tokens)
        if removed and ends_in_tokens:
            try:
                with torch.no_grad():
                    way(net, torch.zeros(1, *net.pretrained_cfg["input_size"]))
            except REFUSALS:  # CrossViT
                reason = "its map cannot be had without layers that would never learn"
                raise UserError("model.backbone", name, reason, "use another (docs/backbones.md lists them)") from None
        if isinstance(pretrained, str):
            ignored = [*_classifiers(net), *removed, *_lacking(name, net)]
            weights.load_file(net, pretrained, ignored, functools.partial(_adapted, net))
        super().__init__(net, features.shape[1], norm, has_map=way is not _vector)
        self.published_side = net.pretrained_cfg["input_size"][-1]
        self.ends_in_tokens = ends_in_tokens
        self._way = way

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, C, H, W], or [B, C, 1, 1]."""
        self._check_device(images.device)
        try:
            return self._way(self.net, images)
        except REFUSALS as error:
            explain_refusal(self.net, self._way, images, self.published_side, error)
            raise


def _create(name: str, published_weights: bool, drop_path: float | None) -> Any:
    net = weights.timm_model(name, published_weights=published_weights, **_options(name, drop_path))
    if drop_path and not any("droppath" in type(module).__name__.lower() for module in net.modules()):
        raise no_drop_path(name, drop_path)
    return net


@functools.lru_cache(maxsize=64)
def _options(name: str, drop_path: float | None) -> dict[str, Any]:
    """Of the constructor: stochastic depth, and images of any size where there is a way to take them."""
    rates = {} if drop_path is None else {"drop_path_rate": drop_path}
    ways: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
    for sizes in ways:
        try:
            with torch.device("meta"):
                weights.timm_model(name, published_weights=False, **sizes, **rates)
        except TypeError as error:
            if "drop_path_rate" in str(error):
                raise no_drop_path(name, drop_path) from None
            if not sizes:
                raise
        else:
            return {**sizes, **rates}
    raise AssertionError("the last way has no option")


def no_drop_path(name: str, drop_path: float | None) -> UserError:
    """The error of a network without stochastic depth that is asked for it."""
    reason = f"{name} has no stochastic depth"
    return UserError(
        "model.drop_path", drop_path, reason, "set it to null, or use another network, such as convnext_tiny"
    )


def _norm_before_pooling(net: Any) -> None:
    """Normalise every token where the published network normalises their mean, as pooling is not the network's here."""
    if isinstance(getattr(net, "norm", None), nn.Identity) and any(True for _ in _parameters(net, "fc_norm")):
        net.norm, net.fc_norm = net.fc_norm, nn.Identity()


def _parameters(net: Any, name: str) -> Iterable[nn.Parameter]:
    module = getattr(net, name, None)
    return module.parameters() if isinstance(module, nn.Module) else ()


def _way(name: str, net: Any) -> tuple[Way, Tensor]:
    """How the features come out of ``net``, and those of a blank image of the size that it was published for, with
    their autograd graph."""
    net.eval()
    blank = torch.zeros(1, *net.pretrained_cfg["input_size"])
    try:
        features = net.forward_features(blank)
        if isinstance(features, Tensor) and features.ndim == 4:
            nhwc = getattr(net, "output_fmt", "NCHW") == "NHWC"
            return (_last_channels, features.permute(0, 3, 1, 2)) if nhwc else (_map, features)
        # timm knows of each network whether its tokens lie on a grid, and in which order. Networks of several scales
        # (CoaT, CrossViT) give the map of the last one.
        if hasattr(net, "forward_intermediates") and not (isinstance(features, Tensor) and features.ndim == 2):
            with contextlib.suppress(AssertionError):  # of Hiera, which normalises after the pooling alone
                return _tokens, _tokens(net, blank)
            return _raw_tokens, _raw_tokens(net, blank)
        if not isinstance(features, Tensor):
            reason = "its features are several tensors, of which none is the map"
            raise UserError("model.backbone", name, reason, "use another network (docs/backbones.md lists them)")
        return _vector, _one_token(net, features)
    finally:
        net.train()


def _map(net: Any, images: Tensor) -> Tensor:
    return net.forward_features(images)


def _last_channels(net: Any, images: Tensor) -> Tensor:
    return net.forward_features(images).permute(0, 3, 1, 2)


def _tokens(net: Any, images: Tensor) -> Tensor:
    return net.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]


def _raw_tokens(net: Any, images: Tensor) -> Tensor:
    return net.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)[-1]


def _vector(net: Any, images: Tensor) -> Tensor:
    return _one_token(net, net.forward_features(images))


def _one_token(net: Any, features: Tensor) -> Tensor:
    """[B, N, C] or [B, C] to [B, C, 1, 1]."""
    if features.ndim == 3:
        features = features[:, 0] if getattr(net, "num_prefix_tokens", 0) else features.mean(1)
    return features[:, :, None, None]


def _classifiers(net: Any) -> list[str]:
    names = net.pretrained_cfg.get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _lacking(name: str, net: nn.Module) -> list[str]:
    """Modules of the published network called ``name`` that ``net`` does without."""
    return sorted({key.rpartition(".")[0] for key in _published_weights(name) - net.state_dict().keys()})


@functools.lru_cache(maxsize=64)
def _published_weights(name: str) -> frozenset[str]:
    """Names of the weights of the network that is published under ``name``."""
    import timm

    with torch.device("meta"):
        return frozenset(timm.create_model(name).state_dict())


def _adapted(net: Any, read: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same network in its authors' names or for other image sizes, as timm reads published ones.

    timm would also make patches of another size fit, which are another network's.
    """
    if "norm.weight" in net.state_dict() and "norm.weight" not in read:
        read = {key.replace("fc_norm.", "norm.") if key.startswith("fc_norm.") else key: t for key, t in read.items()}
    adapt = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return read
    try:
        adapted = adapt(dict(read), net)
    except Exception:  # the weights of another network can raise anything
        return read
    reshaped = [key for key in adapted.keys() & read.keys() if adapted[key].shape != read[key].shape]
    return adapted if all("pos" in key for key in reshaped) else read


def _remove_unused(net: nn.Module, features: Tensor) -> list[str]:
    """Take out of ``net`` the modules whose parameters ``features`` do not depend on; returns their names.

    Some networks normalise or project after the pooling, which is ours. Parameters that never get a gradient would
    make data-parallel training fail; of a module that is used for others they stay as buffers, as do those that are
    constants as published.
    """
    used, visited = set(), set()
    nodes: list[Any] = [features.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        used.add(id(getattr(node, "variable", None)))
        nodes.extend(before for before, _ in node.next_functions)
    removed: list[str] = []
    for name, module in list(net.named_modules()):
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        inside_removed = name.startswith(tuple(f"{parent}." for parent in removed))
        if parameters and not inside_removed and not any(id(parameter) in used for parameter in parameters):
            net.set_submodule(name, nn.Identity())
            removed.append(name)
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in used:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
    return removed
