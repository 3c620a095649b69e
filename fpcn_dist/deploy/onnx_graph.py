"""The graph of an exported model: a network in ONNX's operators, with its metadata, in float32 or partly in 8 bits.

Shape legend: B images of a batch, C channels and h x w cells of the feature map, K classes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxscript  # noqa: F401 (torch.onnx needs it)
import torch
from numpy.typing import NDArray
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from fpcn_dist import __version__
from fpcn_dist.deploy.onnx_predict import FORMAT, INPUT, LOGITS, MASK
from fpcn_dist.models import FPCN, NETWORKS, Classifier
from fpcn_dist.runs.model_folder import ModelInfo
from fpcn_dist.runtime.errors import UserError

# What torch's exporter writes without converting.
_OPSET = 18
_OTHERWISE = "use --format safetensors, or train another backbone"
_QUANTISED_OPERATORS = ["Conv", "MatMul", "Gemm", "Add", "Relu", "Clip", "MaxPool"]


class ExportableModel(nn.Module):
    """A model's forward pass in operators that ONNX has: masked pooling (eq. 1 to 5 and 7) written out.

    Attributes:
        model: the network itself.
        masked: whether it pools inside a region that it finds by a threshold.

    Raises:
        UserError: the model is one of the compared networks, or its region cannot be expressed.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        if not any(type(model) is network.kind and network.has_onnx_form for network in NETWORKS.values()):
            reason = "its forward pass is not written in ONNX's operators"
            raise UserError("model", type(model).__name__, reason, "use --format safetensors")
        self.model = model
        self._config = model.config if isinstance(model, FPCN) and model.config.region != "none" else None
        self.masked = self._config is not None
        if self._config is not None and self._config.region == "largest":
            hint = "export a model that was trained with model.region threshold or none, or use --format safetensors"
            raise UserError("model.region", "largest", "ONNX has no operator for connected regions", hint)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, H', W'] to logits [B, K], mask [B, h, w] and features [B, C, h, w]."""
        features_BChw = self.model.backbone(image)
        if self._config is None:
            mask_Bhw = torch.ones_like(features_BChw[:, 0])
        else:
            mask_Bhw = torch.where(self.excess(features_BChw) >= 0, 1.0, self._config.theta)
        return self.logits(features_BChw, mask_Bhw), mask_Bhw, features_BChw

    def excess(self, features_BChw: Tensor) -> Tensor:
        """[B, h, w]: by how much the channel sum of a cell exceeds the threshold (eq. 1 and 2)."""
        # Pairwise and bounded by the maximum, as in fpcn_kernels: cells that are equal must stay so after rounding.
        sum_BChw = features_BChw
        while (half := sum_BChw.shape[1] // 2) > 0:
            rest_BChw = sum_BChw[:, 2 * half :]
            sum_BChw = sum_BChw[:, :half] + sum_BChw[:, half : 2 * half]
            if rest_BChw.shape[1]:
                sum_BChw = torch.cat([sum_BChw[:, :1] + rest_BChw, sum_BChw[:, 1:]], dim=1)
        sum_Bhw = sum_BChw[:, 0]
        threshold_B = torch.minimum(sum_Bhw.mean((1, 2)), sum_Bhw.amax((1, 2)))
        return sum_Bhw - threshold_B[:, None, None]

    def logits(self, features_BChw: Tensor, mask_Bhw: Tensor) -> Tensor:
        """[B, K] from features pooled with a given mask (eq. 4 to 9)."""
        scaled = self._config is not None and self._config.area_scale
        weight_Bhw = mask_Bhw * mask_Bhw.mean((1, 2), keepdim=True) if scaled else mask_Bhw
        return self.model.logits((features_BChw * weight_Bhw[:, None]).mean((2, 3)))


def to_onnx(exportable: ExportableModel, info: ModelInfo) -> tuple[onnx.ModelProto, list[str]]:
    """The model with its metadata, and the names of the nodes of its head.

    Raises:
        UserError: see :func:`export_graph`.
    """
    size = info.preprocessing.crop
    proto = export_graph(
        exportable.eval(), torch.zeros(2, 3, size, size), [LOGITS, MASK, "features"], info.model.backbone
    )
    # The features are an output only to tell backbone and head apart.
    head = _nodes_after(proto.graph, proto.graph.output.pop().name)
    describe(proto, info)
    return proto, head


def export_graph(module: nn.Module, example: Tensor, outputs: list[str], backbone: str) -> onnx.ModelProto:
    """A module in ONNX's operators, for any number of images of the size of ``example``, two images [2, 3, H', W'].

    Args:
        module: in evaluation mode.
        example: shows the size of an image alone.
        outputs: names of what the module returns.
        backbone: names it in errors.

    Raises:
        UserError: PyTorch's exporter does not know an operator of the backbone, or its code fixes the number of images.
    """
    try:
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            verbose=False,
            external_data=False,
            opset_version=_OPSET,
            input_names=[INPUT],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        detail = str(error).strip().splitlines()[0][:200]
        reason = f"PyTorch cannot export it to ONNX ({detail})"
        raise UserError("model.backbone", backbone, reason, _OTHERWISE) from error
    assert program is not None
    proto = program.model_proto
    # Python code that asks for the number of images fixes it, without an error.
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        reason = "its code fixes the number of images of a batch"
        raise UserError("model.backbone", backbone, reason, _OTHERWISE)
    # The exporter notes source lines of this machine.
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    return proto


def _nodes_after(graph: onnx.GraphProto, tensor: str) -> list[str]:
    """Names of the nodes that depend on ``tensor``; nodes of a valid graph are in topological order."""
    reached, names = {tensor}, []
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            names.append(node.name)
    return names


def describe(proto: onnx.ModelProto, info: ModelInfo) -> None:
    """Write into a model what :func:`fpcn_dist.deploy.onnx_predict.describe` reads."""
    shown = info.preprocessing.preprocessing
    metadata = {
        "format": str(FORMAT),
        "fpcn_dist_version": __version__,
        "task": info.task,
        "classes": json.dumps(info.classes),
        "resize": str(info.preprocessing.resize),
        "crop": str(info.preprocessing.crop),
        "fit": info.preprocessing.fit,
        "on_bad_image": info.preprocessing.on_bad_image,
        "max_pixels": str(info.preprocessing.max_pixels),
        "mean": json.dumps(shown.mean),
        "std": json.dumps(shown.std),
        "interpolation": shown.interpolation,
    }
    onnx.helper.set_model_props(proto, metadata)
    proto.producer_name, proto.producer_version = "fpcn_dist", __version__


class _Calibration(quantization.CalibrationDataReader):
    def __init__(self, images: Iterator[NDArray[np.float32]]) -> None:
        self._images = images

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:  # type: ignore[override]
        images = next(self._images, None)
        return None if images is None else {INPUT: images}


def quantise(
    proto: onnx.ModelProto, info: ModelInfo, head: list[str], images: Iterator[NDArray[np.float32]]
) -> onnx.ModelProto:
    """The same model with its backbone in 8 bits.

    The head stays in float32: it compares sums with their mean, and logits with each other, where 8 bits would make
    ties; its share of size and time is small.

    Args:
        proto, head: what :func:`to_onnx` returned.
        info: for the metadata.
        images: batches [B, 3, crop, crop] of the network's input, whose activations set the ranges.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantised = Path(folder, "prepared.onnx"), Path(folder, "quantised.onnx")
        quant_pre_process(proto, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            quantised,
            _Calibration(images),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=_QUANTISED_OPERATORS,
            nodes_to_exclude=head,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # 7 bits: sums of two products would overflow the 16 bits of x86 processors without VNNI.
            reduce_range=True,
        )
        result = onnx.load(quantised)
    describe(result, info)
    return result
