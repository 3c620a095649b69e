"""One preprocessing contract: every backend gives what Pillow and torchvision give."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms

from fpcn_dist.data.batch import BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.backends import open_backend
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.recipe.preprocessing import IMAGENET
from fpcn_dist.recipe.schema import DataConfig
from tests.helpers.views import crop_views

pytestmark = pytest.mark.usefixtures("backend")
CPU = torch.device("cpu")
LEVEL = 1.01 / 255
"""One grey level, and a little for arithmetic."""


def _pipeline(paths: list[Path], crops: np.ndarray, config: DataConfig) -> Tensor:
    """[B, 3, crop, crop] pixels in [0, 1] as a backend makes them."""
    request = BatchRequest(Blob.of_files(paths), crop_views(crops, config))
    decoding = open_backend("auto").decoding(iter([request]), config, CPU, len(paths), 2)
    with contextlib.closing(decoding):
        images = decoding.next()
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (config.preprocessing.std, config.preprocessing.mean))
    return images * std + mean


def _pillow(path: Path, crop: np.ndarray, config: DataConfig) -> Tensor:
    """[3, crop, crop] pixels in [0, 1] by Pillow's resize, then crop, then flip."""
    row, column, flip = crop.tolist()
    interpolation = Image.Resampling[config.preprocessing.interpolation.upper()]
    resized = Image.open(path).convert("RGB").resize((config.resize, config.resize), interpolation)
    cut = resized.crop((column, row, column + config.crop, row + config.crop))
    return transforms.functional.to_tensor(cut).flip(-1) if flip else transforms.functional.to_tensor(cut)


@pytest.mark.parametrize(
    ("resize", "crop", "own"),
    [
        (64, 56, {}),
        (97, 97, {}),
        (150, 41, {}),
        (256, 224, {}),
        (64, 56, {"interpolation": "bicubic"}),
        (256, 224, {"interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}),
    ],
)
def test_training_views_equal_pillow(rocks: Path, resize: int, crop: int, own: dict) -> None:
    config = DataConfig(resize=resize, crop=crop, **own)
    paths = sorted(rocks.rglob("*.jpg"))[::6]
    rng = np.random.default_rng(0)
    corners = rng.integers(0, resize - crop + 1, size=(len(paths), 2))
    corners[:2] = [[0, 0], [resize - crop] * 2]
    crops = np.concatenate([corners, np.arange(len(paths))[:, None] % 2], axis=1)
    expected = torch.stack([_pillow(path, cut, config) for path, cut in zip(paths, crops, strict=True)])
    difference = (_pipeline(paths, crops, config) - expected).abs()
    assert difference.max() < LEVEL and difference.mean() < 0.1 * LEVEL


def test_evaluation_equals_the_usual_torchvision_transform(rocks: Path) -> None:
    config = DataConfig(resize=75, crop=64, eval_batch_size=5)  # an odd margin: rounding matters
    paths = sorted(rocks.rglob("*.jpg"))[::9]
    usual = transforms.Compose(
        [
            transforms.Resize((75, 75)),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET.mean, IMAGENET.std),
        ]
    )
    loader = EvalLoader(Blob.of_files(paths), np.zeros(8), np.arange(8), config, rank=0, world_size=1, device=CPU)
    images = torch.cat([batch.images for batch in loader])
    expected = torch.stack([usual(Image.open(path).convert("RGB")) for path in paths])
    assert (images - expected).abs().max() < LEVEL / min(IMAGENET.std)


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "WEBP")]
)
def test_other_modes_and_formats_equal_pillows_rgb(rocks: Path, tmp_path: Path, mode: str, form: str) -> None:
    config = DataConfig(resize=64, crop=64)
    path = tmp_path / f"image.{form.lower()}"
    source = Image.open(rocks / "dolomite" / "0001.jpg").convert(mode)
    if mode == "RGBA":
        source.putalpha(120)
    source.save(path, form)
    crops = np.zeros((1, 3), dtype=np.int64)
    difference = (_pipeline([path], crops, config) - _pillow(path, crops[0], config)).abs()
    assert difference.max() < LEVEL * (2 if form == "WEBP" else 1)


def test_cmyk_comes_out_in_its_colours(tmp_path: Path) -> None:
    config = DataConfig(resize=16, crop=16)
    Image.new("RGB", (16, 16), (200, 90, 40)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    pixels = _pipeline([tmp_path / "cmyk.jpg"], np.zeros((1, 3), dtype=np.int64), config)[0].mean(dim=(1, 2)) * 255
    assert (pixels - torch.tensor([200.0, 90.0, 40.0])).abs().max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    config = DataConfig(resize=32, crop=32)
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:16, :32, 0], pixels[16:, :32, 1], pixels[:16, 32:, 2] = 255, 255, 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(path, quality=100, subsampling=0, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path)).resize((32, 32), Image.Resampling.BILINEAR)
    upright = transforms.functional.to_tensor(upright)
    assert (_pipeline([path], np.zeros((1, 3), dtype=np.int64), config)[0] - upright).abs().max() < 2 * LEVEL
