"""Grad-CAM: right where it can be computed by hand, and without a trace in the networks."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fpcn_dist.models import FPCN, Backbone, BilinearCNN, Classifier
from fpcn_dist.recipe.preprocessing import IMAGENET
from fpcn_dist.recipe.schema import DataConfig, ModelConfig
from fpcn_dist.runs.report.samples import SIDE
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.reproduce import gradcam

CLASSES = ("basalt", "dolomite", "marble")


class _Brightness(Backbone):
    """Features that are the image's brightness and darkness in cells of 16 pixels."""

    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d(16), 2, "batch")

    def forward(self, images: Tensor) -> Tensor:
        gray = self.net(images).mean(1, keepdim=True)
        return torch.cat([gray, -gray], 1).relu()


@pytest.fixture(scope="module")
def networks() -> dict[str, Classifier]:
    torch.manual_seed(0)
    fpcn = FPCN("resnet18", 3, hidden=16, region="largest", companion=True)
    return {"plain": Classifier("resnet18", 3), "FPCN": fpcn}


@pytest.fixture(scope="module")
def images() -> Tensor:
    """[2, 3, 96, 128], of a size that is not square."""
    return torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))


def _bright(top: int, left: int) -> Tensor:
    """[3, 128, 128]: black but for a square of 32 pixels."""
    image = torch.zeros(3, 128, 128)
    image[:, top : top + 32, left : left + 32] = 1
    return (image - torch.tensor(IMAGENET.mean)[:, None, None]) / torch.tensor(IMAGENET.std)[:, None, None]


def _by_hand(network: Classifier, image: Tensor) -> tuple[np.ndarray, int]:
    """relu(sum_c mean_hw(dy / dA_chw) A_c) of the last block, enlarged to the image."""
    network.eval()
    kept: list[Tensor] = []
    *_, last_block = list(network.backbone.net.children())[-1].children()
    handle = last_block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits_K = network(image[None].clone().requires_grad_())[0]
    handle.remove()
    (features_BCHW,) = kept
    (gradients_BCHW,) = torch.autograd.grad(logits_K.max(), features_BCHW)
    map_HW = (gradients_BCHW.mean((2, 3), keepdim=True) * features_BCHW).sum(1)[0].relu().detach()
    (large_HW,) = F.interpolate(_scaled(map_HW)[None, None], image.shape[1:], mode="bilinear")[0]
    network.train()
    return _scaled(large_HW).numpy(), int(logits_K.argmax())


def _scaled(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("title", ["plain", "FPCN"])
def test_it_is_grad_cam_of_the_last_block(networks: dict[str, Classifier], images: Tensor, title: str) -> None:
    for image in images:
        seen = gradcam.look(networks[title], image)
        heat_HW, predicted = _by_hand(networks[title], image)
        assert seen.heat.shape == image.shape[1:] and seen.predicted == predicted
        np.testing.assert_allclose(seen.heat, heat_HW, atol=2e-3)


@pytest.mark.parametrize("backbone", ["resnet18", "test_resnet", "shufflenet_v2_x1_5"])
def test_fpcn_without_a_companion_and_other_backbones(images: Tensor, backbone: str) -> None:
    torch.manual_seed(0)
    network = FPCN(backbone, 3, hidden=16)
    heat_HW = gradcam.look(network, images[0]).heat
    assert heat_HW.shape == (96, 128) and heat_HW.min() == 0 and heat_HW.max() == pytest.approx(1, abs=1e-3)
    assert heat_HW.std() > 0.05


def test_where_nothing_speaks_for_the_class_nothing_is_hot() -> None:
    network = Classifier(_Brightness(), 3)
    with torch.no_grad():
        network.classifier.weight.copy_(torch.tensor([[-1.0, -1.0], [-2.0, -2.0], [-2.0, -2.0]]))
        network.classifier.bias.zero_()
    seen = gradcam.look(network, _bright(0, 96))
    assert seen.predicted == 0 and (seen.heat == 0).all()


def test_the_tokens_of_a_transformer_have_heat() -> None:
    torch.manual_seed(0)
    heat_HW = gradcam.look(Classifier("test_vit", 3), torch.randn(3, 96, 96)).heat
    assert heat_HW.shape == (96, 96) and heat_HW.std() > 0.05


@pytest.mark.parametrize(("top", "left"), [(0, 96), (64, 32)])
def test_the_evidence_is_where_it_was_put(top: int, left: int) -> None:
    network = Classifier(_Brightness(), 3)
    with torch.no_grad():
        network.classifier.weight.copy_(torch.tensor([[0.0, -1.0], [3.0, 0.0], [-1.0, 0.0]]))
        network.classifier.bias.copy_(torch.tensor([0.0, 2.0, 0.0]))
    heat_HW, predicted, probability = gradcam.look(network, _bright(top, left))
    inside = np.zeros((128, 128), dtype=bool)
    inside[top : top + 32, left : left + 32] = True
    assert predicted == 1 and probability > 0.8
    hot = heat_HW > 0.5
    assert (hot & inside).sum() > 0.9 * (hot | inside).sum()
    assert heat_HW[~inside].mean() < 0.05
    expected = network.eval()(_bright(top, left)[None]).softmax(1)[0, 1].item()
    assert probability == pytest.approx(expected, abs=1e-6)


def test_comparison(networks: dict[str, Classifier], images: Tensor, tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "figure5"
    arguments = (images, torch.tensor([2, 0]), ["a/1.jpg", "b/2.jpg"], CLASSES, folder, tmp_path, DataConfig())
    comparisons = gradcam.compare(networks, *arguments)
    assert [(c.image, c.truth) for c in comparisons] == [("a/1.jpg", "marble"), ("b/2.jpg", "basalt")]
    for number, comparison in enumerate(comparisons):
        assert [heatmap.title for heatmap in comparison.heatmaps] == ["plain", "FPCN"]
        files = [comparison.jpeg, *(heatmap.jpeg for heatmap in comparison.heatmaps)]
        assert len(set(files)) == 3 and all(file.startswith("pictures/figure5/") for file in files)
        drawings = [Image.open(tmp_path / file) for file in files]
        assert all((d.format, d.mode, d.size) == ("JPEG", "RGB", (SIDE, SIDE)) for d in drawings)
        plain, *heats = (np.asarray(drawing, dtype=float) for drawing in drawings)
        assert abs(heats[0] - heats[1]).mean() > 5 and abs(plain - heats[0]).mean() > 5
        for heatmap, network in zip(comparison.heatmaps, networks.values(), strict=True):
            seen = gradcam.look(network, images[number])
            assert (heatmap.predicted, heatmap.probability) == (CLASSES[seen.predicted], seen.probability)
    assert len(list(folder.iterdir())) == 6


def test_hot_is_yellow_and_cold_is_gray(tmp_path: Path) -> None:
    network = Classifier(_Brightness(), 3)
    with torch.no_grad():
        network.classifier.weight.copy_(torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 0.0]]))
        network.classifier.bias.zero_()
    (comparison,) = gradcam.compare(
        {"net": network}, _bright(0, 96)[None], [1], ["x"], CLASSES, tmp_path, tmp_path, DataConfig()
    )
    plain, heat = (np.asarray(Image.open(tmp_path / f), float) for f in (comparison.jpeg, comparison.heatmaps[0].jpeg))
    assert plain[16, 240].min() > 240 and plain[200, 40].max() < 15
    assert heat[16, 240, 0] > heat[16, 240, 2] + 25 and heat[16, 240].min() > 180
    assert heat[200, 40].max() < 15


def _state(network: nn.Module) -> tuple[Any, ...]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in network.modules()]
    values = {name: value.clone() for name, value in network.state_dict().items()}
    grads = [parameter.grad for parameter in network.parameters()]
    required = [parameter.requires_grad for parameter in network.parameters()]
    return [module.training for module in network.modules()], required, hooks, grads, values


def _check_unchanged(network: nn.Module, before: tuple[Any, ...]) -> None:
    after = _state(network)
    assert after[:3] == before[:3]
    assert all(now is then for now, then in zip(after[3], before[3], strict=True)), "gradients"
    assert all(torch.equal(value, before[4][name]) for name, value in after[4].items()), "weights or statistics"


def _prepared(title: str) -> Classifier:
    """In a state that no default gives: frozen in parts, with gradients, partly in evaluation mode."""
    torch.manual_seed(0)
    network = Classifier("resnet18", 3) if title == "plain" else FPCN("resnet18", 3, hidden=16)
    next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    for number, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    return network


@pytest.mark.parametrize("title", ["plain", "FPCN"])
def test_networks_are_left_as_they_were(images: Tensor, title: str, tmp_path: Path) -> None:
    network = _prepared(title)
    before = _state(network)
    copies = [None if gradient is None else gradient.clone() for gradient in before[3]]
    with torch.no_grad():  # which an evaluation around it may have said
        gradcam.compare({title: network}, images, [0, 1], ["a", "b"], CLASSES, tmp_path, tmp_path, DataConfig())
    _check_unchanged(network, before)
    assert all(copy is None or torch.equal(copy, now) for copy, now in zip(copies, before[3], strict=True))
    assert not images.requires_grad and images.grad is None


def test_networks_are_left_as_they_were_after_an_error(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    network = _prepared("FPCN")
    before = _state(network)

    def fail(pooled: Tensor) -> Tensor:
        raise IndexError("no such cell")

    monkeypatch.setattr(network, "logits", fail)
    with pytest.raises(IndexError, match="no such cell") as caught:
        gradcam.look(network, images[0])
    _check_unchanged(network, before)
    del caught  # whose traceback has kept everything alive until here


@pytest.mark.parametrize(
    "build",
    [
        lambda: BilinearCNN(ModelConfig(backbone="resnet18", pretrained=False), 3),
        lambda: Classifier("alexnet", 3),
        lambda: Classifier("lenet", 3),
    ],
    ids=["another head", "torchvision", "lenet"],
)
def test_networks_without_a_map_are_refused(build: Callable[[], Classifier], images: Tensor) -> None:
    with pytest.raises(UserError, match=r"grad-cam the net: .* one feature map .*; compare plain classifiers and FPCN"):
        gradcam.look(build(), images[0], title="the net")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'pytorch_grad_cam'", name="pytorch_grad_cam"),
            r"^grad-cam: .*no module pytorch_grad_cam; pip install 'fpcn-dist\[reproduce\]'$",
        ),
        (
            ImportError("libGL.so.1: cannot open shared object file: No such file or directory"),
            r"^grad-cam: the package cannot be loaded \(libGL\.so\.1: .*\); install that system library .* libgl1",
        ),
    ],
    ids=["missing", "OpenCV without its libraries"],
)
def test_a_missing_package_is_named(
    networks: dict[str, Classifier],
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    error: ImportError,
    message: str,
    tmp_path: Path,
) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "pytorch_grad_cam":
            raise error
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "pytorch_grad_cam", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=message):
        gradcam.compare(networks, images, [0, 1], ["a", "b"], CLASSES, tmp_path, tmp_path, DataConfig())
    monkeypatch.undo()
    assert gradcam.look(networks["plain"], images[0]).heat.shape == (96, 128)


def test_only_a_reproduction_with_figure_5_loads_the_package() -> None:
    module = "fpcn_dist.studies.reproduce.gradcam"
    code = f"import sys, {module}; sys.exit('cv2' in sys.modules or 'pytorch_grad_cam' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
