"""How an image gets its size, and random resized crops: against torchvision and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from fpcn_dist.data.resizing import view_crop
from fpcn_dist.data.views import centre_views, views
from fpcn_dist.recipe.augment import AugmentConfig
from fpcn_dist.recipe.schema import DataConfig

SIZES = [(60, 90), (90, 60), (71, 71), (40, 333), (333, 40)]


def _image(height: int, width: int) -> Tensor:
    """Smooth, with some noise: [height, width, 3] uint8."""
    rng = np.random.default_rng(height)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(small) + rng.normal(0, 20, (height, width, 3))
    return torch.from_numpy(np.clip(noisy, 0, 255).astype(np.uint8))


def _by_torchvision(image_HWC: Tensor, *steps) -> Tensor:
    return v2.Compose(steps)(image_HWC.permute(2, 0, 1)).permute(1, 2, 0)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("crop", [31, 40, 48])
def test_short_side_is_torchvisions_resize_and_centre_crop(height: int, width: int, crop: int) -> None:
    image = _image(height, width)
    ours = view_crop(image, centre_views(1)[0], DataConfig(resize=48, crop=crop, fit="short_side"))
    assert torch.equal(ours, _by_torchvision(image, v2.Resize(48, antialias=True), v2.CenterCrop(crop)))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("crop", [39, 48])
def test_pad_keeps_the_aspect_ratio_and_fills_up_with_black(height: int, width: int, crop: int) -> None:
    image = _image(height, width)
    ours = view_crop(image, centre_views(1)[0], DataConfig(resize=48, crop=crop, fit="pad"))
    rows, columns = (max(1, round(48 * side / max(height, width))) for side in (height, width))
    small = np.asarray(Image.fromarray(image.numpy()).resize((columns, rows), Image.Resampling.BILINEAR))
    top, left = (48 - rows) // 2, (48 - columns) // 2
    expected = np.zeros((48, 48, 3), dtype=int)
    expected[top : top + rows, left : left + columns] = small
    corner = round((48 - crop) / 2)
    difference = ours.numpy() - expected[corner : corner + crop, corner : corner + crop]
    assert np.abs(difference).max() <= 1
    black = (expected == 0).all(axis=(1, 2)).sum() + (expected == 0).all(axis=(0, 2)).sum()
    assert black == 96 - rows - columns or height == width


@pytest.mark.parametrize("fit", ["squeeze", "pad", "short_side"])
def test_training_crops_are_parts_of_the_frame_and_reach_its_ends(fit) -> None:
    image, frame = _image(60, 90), (24, 36 if fit == "short_side" else 24)
    config = DataConfig(resize=24, crop=16, fit=fit)
    drawn = views(0, np.arange(600), np.zeros(600, dtype=np.int64), config)
    tops, lefts = (
        set((drawn[name] * (length - 16)).round().astype(int).tolist())
        for name, length in zip(("down", "right"), frame, strict=True)
    )
    assert tops == set(range(frame[0] - 15)) and lefts == set(range(frame[1] - 15))
    if fit == "short_side":
        resized = _by_torchvision(image, v2.Resize(24, antialias=True))
    else:
        resized = view_crop(image, centre_views(1)[0], DataConfig(resize=24, crop=24, fit=fit))
    assert tuple(resized.shape[:2]) == frame
    for view in drawn[:20]:
        top, left = (round(view[name] * (length - 16)) for name, length in zip(("down", "right"), frame, strict=True))
        assert torch.equal(view_crop(image, view, config), resized[top : top + 16, left : left + 16])


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("fit", ["squeeze", "pad", "short_side"])
def test_a_random_resized_crop_is_torchvisions_of_the_same_window(height: int, width: int, fit) -> None:
    augment = AugmentConfig(random_resized_crop=(0.1, 0.6), ratio=(0.5, 2.0))
    config = DataConfig(resize=40, crop=32, fit=fit, augment=augment)
    image = _image(height, width)
    canvas = image
    if fit == "pad":
        long = max(height, width)
        above, before = (long - height) // 2, (long - width) // 2
        canvas = torch.zeros(long, long, 3, dtype=torch.uint8)
        canvas[above : above + height, before : before + width] = image
    frame_ratio = 1 if fit == "squeeze" else canvas.shape[1] / canvas.shape[0]
    fitting = 0
    for view in views(3, np.arange(25), np.zeros(25, dtype=np.int64), config):
        scale, ratio = float(view["scale"]), float(view["ratio"])
        rows = max(1, round(canvas.shape[0] * min(1, (scale / ratio * frame_ratio) ** 0.5)))
        columns = max(1, round(canvas.shape[1] * min(1, (scale * ratio / frame_ratio) ** 0.5)))
        if rows < canvas.shape[0] and columns < canvas.shape[1]:
            fitting += 1
            share = rows * columns / canvas.shape[0] / canvas.shape[1]
            assert share == pytest.approx(scale, rel=0.1)
            if fit != "squeeze":
                assert columns / rows == pytest.approx(ratio, rel=0.15)
        top, left = round(view["down"] * (canvas.shape[0] - rows)), round(view["right"] * (canvas.shape[1] - columns))
        channels_first = canvas.permute(2, 0, 1)
        expected = v2.functional.resized_crop(channels_first, top, left, rows, columns, [32, 32], antialias=True)
        assert torch.equal(view_crop(image, view, config), expected.permute(1, 2, 0))
    assert fitting or max(height, width) > 2 * min(height, width)
