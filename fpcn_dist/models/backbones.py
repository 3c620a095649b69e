"""Backbones: convolutional feature extractors, from torchvision and timm by name.

Both libraries are imported where a network of theirs is built: torchvision brings torch's compiler, more than a second,
and timm half a second more, which commands and tests without such a network need not wait for.

Legend: B images, C channels and H x W cells of the feature map.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fpcn_dist.models import weights
from fpcn_dist.models.base import Backbone
from fpcn_dist.models.lenet import LeNet
from fpcn_dist.models.packaged import PACKAGED, packaged_file
from fpcn_dist.models.published import RESNETS, find_network
from fpcn_dist.runtime.errors import UserError

_IMAGENET_CLASSES = 1000


def build_backbone(name: str, *, pretrained: bool | str = False, norm: str = "batch") -> Backbone:
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
    if network.library == "own":
        return LeNet(pretrained, norm)
    if network.library == "timm":
        return TimmNet(network.name, pretrained, norm)
    return (ResNet if name in RESNETS else TorchvisionNet)(network.name, pretrained, norm)


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

    def __init__(self, name: str, pretrained: bool | str, norm: str) -> None:
        from torchvision import models

        # Of the networks that timm lacks, this one has auxiliary classifiers, normalises images in its own way, and
        # warns unless told how to initialise. A trained model is built again without pretrained weights, so no option
        # may depend on them.
        own = {"aux_logits": False, "transform_input": True, "init_weights": True}
        options = own if name == "googlenet" else {}
        net = models.get_model(name, weights=None, **options)
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
        features = self.net(images)
        return features if features.ndim == 4 else features[:, :, None, None]


class TimmNet(Backbone):
    """Any network of timm. Of one that ends in tokens the features are its class token, or their mean without one."""

    net: Any

    def __init__(self, name: str, pretrained: bool | str, norm: str) -> None:
        net = weights.timm_model(name, published_weights=pretrained is True)
        features = _probe(net)
        has_map = features.ndim == 4
        if not has_map:
            features = _one_token(net, features)
        channels_last = has_map and getattr(net, "output_fmt", "NCHW") == "NHWC"
        removed = _remove_unused(net, features)
        if isinstance(pretrained, str):
            weights.load_file(net, pretrained, ignored=[*_classifiers(net), *removed])
        super().__init__(net, features.shape[-1 if channels_last else 1], norm, has_map=has_map)
        self.channels_last = channels_last

    def forward(self, images: Tensor) -> Tensor:
        self._check_device(images.device)
        features = self.net.forward_features(images)
        if not self.has_map:
            return _one_token(self.net, features)[:, :, None, None]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def _one_token(net: Any, features: Tensor) -> Tensor:
    """[B, N, C] or [B, C] to [B, C]."""
    if features.ndim == 2:
        return features
    return features[:, 0] if getattr(net, "num_prefix_tokens", 0) else features.mean(1)


def _classifiers(net: Any) -> list[str]:
    names = net.pretrained_cfg.get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _probe(net: Any) -> Tensor:
    """Features of one blank image of the size that ``net`` was published for, with their autograd graph."""
    net.eval()
    features = net.forward_features(torch.zeros(1, *net.pretrained_cfg["input_size"]))
    net.train()
    return features


def _remove_unused(net: nn.Module, features: Tensor) -> list[str]:
    """Take out of ``net`` the modules whose parameters ``features`` do not depend on; returns their names.

    Some networks normalise or project after the pooling, which is ours. Parameters that never get a gradient would
    make data-parallel training fail.
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
    return removed
