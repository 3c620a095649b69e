"""Frozen backbones on the CPU, through onnxruntime: the features of eager PyTorch in a fraction of its time.

What goes through here is said in a line, and is equal to eager PyTorch to 1e-4 of the largest feature, or goes through
eager PyTorch, with a line that says why. As the device and the decoder of images, it is part of neither a run's nor a
bank's identity: rounding alone differs (docs/probe.md).

Shape legend: B images, C channels and h x w cells of the feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpcn_dist.models import FPCN, NETWORKS, Backbone, Classifier
from fpcn_dist.models.modes import evaluating
from fpcn_dist.runtime.errors import UserError

WORTH_EXPORTING = 500
"""Images from which on the seconds of an export are won back: 2 (ResNet-18) to 7 (MobileNetV2) of one CPU core."""
_LIMIT = 1e-4
"""Largest difference from eager PyTorch, as a share of the largest feature."""


class FrozenBackbone(Backbone):
    """A backbone that only looks: in evaluation mode, without gradients, and on a CPU through onnxruntime.

    It is exported at the first batch, whose features must agree with those of eager PyTorch. That computes all else,
    too: batches on a GPU, under autocast or of another size, and whatever cannot be exported or does not agree.

    Args:
        backbone: the network, whose weights must not change once a batch was shown. Its modes stay as they are.
        threads: of onnxruntime; ``None``: as many as PyTorch has.
    """

    def __init__(self, backbone: Backbone, threads: int | None = None) -> None:
        super().__init__(backbone, backbone.channels, "batch", has_map=backbone.has_map)
        self._threads = threads
        self._session: Any = None
        self._size: torch.Size | None = None

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Nothing changes: the network may be somebody else's, who trains it."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, C, h, w], without gradients."""
        if images.device.type != "cpu" or images.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return self.eager(images)
        if self._size is None:
            self._size = images.shape[1:]
            self._session = self._open(images)
        if self._session is None or images.shape[1:] != self._size:
            return self.eager(images)
        return _run(self._session, images)

    @torch.no_grad()
    def eager(self, images: Tensor) -> Tensor:
        """The same, by eager PyTorch."""
        with evaluating(self.net):
            return self.net(images)

    def _open(self, images: Tensor) -> Any:
        """A session that computes what eager PyTorch does for ``images``, or ``None`` after a line that says why."""
        expected = self.eager(images)
        try:
            # Each of these packages may be missing where nothing is exported.
            import onnxruntime

            from fpcn_dist.deploy.onnx_graph import export_graph
            from fpcn_dist.deploy.onnx_predict import open_session

            # A tensor made in inference mode cannot be exported.
            with torch.inference_mode(False), torch.no_grad(), evaluating(self.net):
                example, name = torch.zeros(2, *images.shape[1:]), type(self.net).__name__
                graph = export_graph(self.net, example, ["features"], name)
            threads = self._threads or torch.get_num_threads()
            session = open_session(graph.SerializeToString(), threads=threads)
            difference = (_run(session, images) - expected).abs().max().item() / (expected.abs().max().item() or 1.0)
        except ModuleNotFoundError as error:
            return _fall_back(f"{error.name} is not installed")
        except UserError as error:
            return _fall_back(error.reason)
        # onnxruntime's exceptions share no base of their own, and the exporter runs any network's code.
        except Exception as error:
            return _fall_back(" ".join(str(error).split())[:200])
        if not difference <= _LIMIT:
            return _fall_back(f"onnxruntime differs by {difference:.1e} of the largest feature")
        version = f"onnxruntime {onnxruntime.__version__} ({threads} threads)"
        print(f"frozen backbone: {version}, at most {difference:.1e} of the largest feature from PyTorch", flush=True)
        return session


def _run(session: Any, images: Tensor) -> Tensor:
    (features,) = session.run(None, {session.get_inputs()[0].name: images.contiguous().numpy()})
    return torch.from_numpy(features)


def _fall_back(reason: str) -> None:
    print(f"frozen backbone: eager PyTorch computes it, as {reason}", flush=True)


def frozen_features(
    backbone: Backbone, device: torch.device, threads: int | None = None, *, images: int | None = None
) -> Callable[[Tensor], Tensor]:
    """What maps images [B, 3, H, W] on ``device`` to features [B, C, h, w] of a backbone that stays as it is now.

    Args:
        backbone, threads: see :class:`FrozenBackbone`.
        device: where ``backbone`` is put.
        images: how many will be shown; few are not worth an export. ``None``: enough.
    """
    frozen = FrozenBackbone(backbone.to(device), threads)
    return frozen if images is None or images >= WORTH_EXPORTING else frozen.eager


def with_frozen_backbone(model: Classifier, images: int, threads: int | None = None) -> Classifier:
    """``model``, which is to look at so many images, with its backbone frozen where that is worth an export.

    Left as they are: a model on a GPU, the compared networks, which may show their backbones parts of an image, and
    networks that read more of theirs than the features.
    """
    companion = isinstance(model, FPCN) and model.config.companion
    exportable = any(type(model) is network.kind and network.has_onnx_form for network in NETWORKS.values())
    on_cpu = next(model.parameters()).device.type == "cpu"
    if images >= WORTH_EXPORTING and on_cpu and exportable and not companion:
        model.backbone = FrozenBackbone(model.backbone, threads)
    return model
