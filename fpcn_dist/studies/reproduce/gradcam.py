"""Where networks look, by Grad-CAM: the paper's Figure 5.

Grad-CAM weights each channel of the last feature map with the mean gradient of the predicted class's logit, and shows
the positive part of the sum: heat = relu(sum_c mean_hw(dy / dA_chw) A_c), scaled to 0 .. 1 for each image.

Shape legend: B images, K classes, H x W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fpcn_dist.models.backbones import ResNet
from fpcn_dist.models.classifier import Classifier
from fpcn_dist.models.fpcn import FPCN
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runs.report.overlay import to_pixels
from fpcn_dist.runs.report.samples import SIDE
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder, replacing
from fpcn_dist.studies.reproduce.tables import Comparison, Heatmap


class Look(NamedTuple):
    """What a network saw in an image: heat [H, W] from 0 to 1, and the class that it is the evidence for.

    The heat is 0 everywhere where the network decided by what speaks against the other classes alone.
    """

    heat: NDArray[np.float32]
    predicted: int
    probability: float


def compare(
    networks: Mapping[str, Classifier],
    images: Tensor,
    labels: Sequence[int] | Tensor,
    paths: Sequence[str],
    classes: Sequence[str],
    folder: Path,
    output: Path,
    config: DataConfig,
) -> tuple[Comparison, ...]:
    """Draw each image plain and with the heat of every network over it, as JPEGs of ``SIDE`` pixels in ``folder``.

    The networks are left as they were: their modes, gradients, what requires one, and their hooks.

    Args:
        networks: title -> a plain classifier or FPCN, each on its device.
        images: [B, 3, H, W], normalised, on any device.
        labels: B true classes.
        paths: B paths in the data set.
        classes: K names in label order.
        folder: for the JPEGs; made where it is missing, in or below ``output``.
        output: what the paths of the JPEGs are relative to.
        config: how the images are normalised.

    Raises:
        UserError: the package grad-cam is missing or cannot be loaded, a network does not classify by one feature map,
            a file cannot be written.
    """
    make_folder(folder)
    comparisons = []
    for number, image in enumerate(images):
        pixels = to_pixels(image, config)
        heatmaps = []
        for place, (title, network) in enumerate(networks.items(), start=1):
            seen = look(network, image, title=title)
            jpeg = _save(_draw_heat(pixels, seen.heat), folder / f"{number}-{place}.jpg", output)
            heatmaps.append(Heatmap(title, classes[seen.predicted], seen.probability, jpeg))
        plain = _save(pixels, folder / f"{number}-image.jpg", output)
        comparisons.append(Comparison(paths[number], classes[int(labels[number])], plain, tuple(heatmaps)))
    return tuple(comparisons)


def look(network: Classifier, image: Tensor, *, title: str = "network") -> Look:
    """Grad-CAM of the predicted class at the last feature map, in evaluation mode.

    Args:
        network: on its device; left as it was.
        image: [3, H, W], normalised.
        title: the name of the network, for the message.

    Raises:
        UserError: see :func:`compare`.
    """
    library = _load_library()
    if type(network) not in (Classifier, FPCN) or not network.backbone.has_map:
        # Several maps (MMAL-Net has one of the image and one of its object) or none are no single place to look at.
        raise UserError(
            "grad-cam",
            title,
            "this network does not classify by one feature map of the image",
            "compare plain classifiers and FPCN, with a backbone that keeps the image's layout, such as a ResNet",
        )
    with _borrowed(network), torch.enable_grad():
        cam = library.GradCAM(network, [_last_layer(network)])
        # Not `with cam:`, which prints IndexErrors instead of raising them.
        try:
            # The image requires a gradient so that the parameters, frozen meanwhile, need not.
            (heat_HW,) = cam(image[None].detach().clone().requires_grad_(), targets=None)
            probabilities_K = cam.outputs[0].detach().float().softmax(0)
        finally:
            cam.activations_and_grads.release()
    predicted = int(probabilities_K.argmax())
    return Look(heat_HW, predicted, float(probabilities_K[predicted]))


def _load_library() -> Any:
    """The package pytorch_grad_cam; only this figure needs it."""
    try:
        import pytorch_grad_cam
    except ModuleNotFoundError as error:
        reason = f"Figure 5 needs the package, and Python finds no module {error.name}"
        raise UserError("grad-cam", None, reason, "pip install 'fpcn-dist[reproduce]'") from error
    except ImportError as error:
        # An OpenCV with windows, which some other package has brought along, wants the libraries of a desktop.
        hint = (
            "install that system library (libGL.so.1 is in Debian's libgl1, libgthread-2.0.so.0 in libglib2.0-0), or "
            "do without it: pip uninstall opencv-python && pip install --force-reinstall opencv-python-headless"
        )
        raise UserError("grad-cam", None, f"the package cannot be loaded ({error})", hint) from error
    return pytorch_grad_cam


def _last_layer(network: Classifier) -> nn.Module:
    """What gives the last feature map; of a ResNet its last block, since FPCN with a companion calls block by block."""
    if isinstance(network.backbone, ResNet):
        *_, last_stage = network.backbone.net.children()
        *_, last_block = last_stage.children()
        return last_block
    return network.backbone


@contextlib.contextmanager
def _borrowed(network: nn.Module) -> Iterator[None]:
    """Freeze the parameters; afterwards give back their gradients and every module's mode, which Grad-CAM changes."""
    modes = {module: module.training for module in network.modules()}
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in network.parameters()]
    for parameter, _, _ in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _draw_heat(pixels: NDArray[np.uint8], heat_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Half the image in gray, half the heat from black over purple to yellow, whose brightness rises with it."""
    gray = pixels.astype(np.float32).mean(axis=2, keepdims=True)
    colour = 255 * matplotlib.colormaps["inferno"](heat_HW)[..., :3]
    return (0.5 * gray + 0.5 * colour).round().astype(np.uint8)


def _save(pixels: NDArray[np.uint8], path: Path, output: Path) -> str:
    with replacing(path) as temporary:
        drawing = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        drawing.save(temporary, format="JPEG", quality=85)
    return path.relative_to(output).as_posix()
