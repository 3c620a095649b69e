"""What views change: against references, and the same from both backends, in batches that restarts and ranks share."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from fpcn_dist.data.augmentation import color_jitter, policy_operation, view_pixels
from fpcn_dist.data.batch import BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.backends import has_dali, open_backend
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.data.views import OPERATIONS, centre_views, views
from fpcn_dist.recipe.schema import DataConfig

CPU = torch.device("cpu")
needs_dali = pytest.mark.skipif(not has_dali(), reason="needs DALI")

AUGMENTATIONS = {
    "pad": {"fit": "pad"},
    "short side": {"fit": "short_side"},
    "resized crop": {"augment": {"random_resized_crop": (0.2, 1.0)}},
    "resized crop, pad": {"fit": "pad", "augment": {"random_resized_crop": (0.2, 1.0)}},
    "colours": {"augment": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}},
    "TrivialAugment": {"augment": {"policy": "trivial"}},
    "RandAugment": {"augment": {"policy": "rand"}},
    "erasing": {"augment": {"erasing": 0.8}},
    "everything": {
        "fit": "short_side",
        "augment": {"random_resized_crop": (0.2, 1.0), "hue": 0.1, "policy": "rand", "erasing": 0.5},
    },
}


def _config(name: str, **values) -> DataConfig:
    usual = {"resize": 40, "crop": 32, "images_per_class": 4, "threads": 2}
    return DataConfig.model_validate(usual | AUGMENTATIONS[name] | values)


def _requests(paths: list[Path], config: DataConfig) -> list[BatchRequest]:
    """Two batches of other views."""
    ids = np.arange(len(paths))
    return [BatchRequest(Blob.of_files(paths), views(1, ids, ids * 0 + step, config)) for step in (0, 1)]


def _decoded(paths: list[Path], config: DataConfig) -> list[Tensor]:
    requests = _requests(paths, config)
    decoding = open_backend(config.backend).decoding(iter(requests), config, CPU, len(paths), 2)
    with contextlib.closing(decoding):
        return [decoding.next() for _ in requests]


@pytest.fixture
def paths(rocks: Path, tmp_path: Path) -> list[Path]:
    """Photographs, among them one of each orientation."""
    found = sorted(rocks.rglob("*.jpg"))[::9]
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(found[0]) as photograph:
            photograph.crop((0, 0, 60, 44)).save(tmp_path / f"turned{orientation}.jpg", exif=exif)
    return found + sorted(tmp_path.glob("turned*.jpg"))


@needs_dali
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_both_backends_make_the_same_views(paths: list[Path], name: str) -> None:
    dali, ours = (_decoded(paths, _config(name, backend=backend)) for backend in ("dali", "torchvision"))
    plain = _decoded(paths, _config(name, backend="torchvision", fit="squeeze", augment={}))
    for one, other, unchanged in zip(dali, ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert ((other - unchanged).abs().amax((1, 2, 3)) > 0.1).float().mean() > 0.2
    assert not torch.equal(ours[0], ours[1])


@needs_dali
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_what_a_gpu_makes_of_decoded_images_is_the_same(paths: list[Path], name: str) -> None:
    """The pipeline of a GPU on the CPU: DALI decodes, PyTorch makes the views of its list of images."""
    from nvidia.dali import Pipeline

    from fpcn_dist.data.decoding.dali import Afterwards, decoded_by_dali, is_plain, read_ahead

    config = _config(name)
    assert not is_plain(config)
    afterwards = Afterwards(config, CPU)
    pipeline = Pipeline(batch_size=len(paths), num_threads=1, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        read = read_ahead(iter(_requests(paths, config)), config, 1)
        pipeline.set_outputs(decoded_by_dali(afterwards.note(read), "cpu"))
    for expected in _decoded(paths, _config(name, backend="torchvision")):
        (images,) = pipeline.run()
        torch.testing.assert_close(afterwards(images), expected, rtol=0, atol=1e-5)
    with pytest.raises(StopIteration):
        pipeline.run()


@needs_dali
def test_plain_views_of_a_gpu_are_the_same_within_a_grey_level(paths: list[Path]) -> None:
    from nvidia.dali import Pipeline

    from fpcn_dist.data.decoding.dali import PlainAfterwards, is_plain, plain_views_by_dali, read_ahead

    config = DataConfig(resize=40, crop=32, augment={"mixup": 0.2})  # pyright: ignore[reportArgumentType]
    assert is_plain(config)
    requests = _requests(paths, config)
    for request in requests:  # away from the edge of the whole image, which the two treat differently
        request.views["down"], request.views["right"] = (
            0.125 + 0.75 * (request.views[name] * 6).round() / 6 for name in ("down", "right")
        )
    afterwards = PlainAfterwards()
    pipeline = Pipeline(batch_size=len(paths), num_threads=1, device_id=None)
    with pipeline:
        read = afterwards.note(read_ahead(iter(requests), config, 1))
        pipeline.set_outputs(plain_views_by_dali(read, config, "cpu"))
    (images,) = pipeline.run()
    decoding = open_backend("torchvision").decoding(iter(requests), config, CPU, len(paths), 1)
    with contextlib.closing(decoding):
        difference = afterwards(images) - decoding.next()
    assert difference.abs().max() < 1.01 / 255 / 0.224


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_batches_are_the_same_after_a_restart_and_for_any_number_of_ranks(rocks: Path, name: str) -> None:
    config = _config(name, backend="torchvision")
    manifest = build_manifest(rocks, config, seed=0)

    def batches(rank: int = 0, world_size: int = 1, start_step: int = 0, count: int = 3) -> list[Tensor]:
        loader = TrainLoader(manifest, config, 5, rank=rank, world_size=world_size, device=CPU, start_step=start_step)
        with contextlib.closing(loader):
            return [next(loader).images for _ in range(count)]

    whole = batches()
    assert torch.equal(batches(start_step=2, count=1)[0], whole[2])
    shares = [batches(rank, 3, count=2) for rank in range(3)]
    for step, images in enumerate(whole[:2]):
        assert torch.equal(torch.cat([share[step] for share in shares]), images)


def _pixels(low: int = 0, high: int = 256) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(low, high, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "position", "factors"),
    [("brightness", 0, (0, 0.4, 1.7)), ("contrast", 1, (0, 0.3, 1.9)), ("saturation", 2, (0, 0.5, 2.2))],
)
def test_brightness_contrast_and_saturation_are_torchvisions(name: str, position: int, factors) -> None:
    pixels = _pixels()
    for factor in factors:
        values = [1.0, 1.0, 1.0, 0.0]
        values[position] = factor
        expected = getattr(v2.functional, f"adjust_{name}")(pixels.permute(2, 0, 1), factor).permute(1, 2, 0)
        # Torchvision cuts decimals off where ours are rounded, once for the grey and once for the result.
        assert (color_jitter(pixels, *values).int() - expected.int()).abs().max() <= 2


def test_colour_jitter_equals_its_steps_in_float64() -> None:
    pixels, (brightness, contrast, saturation, hue) = _pixels(), (1.2, 0.7, 1.4, 0.08)
    x = pixels.double().numpy() * brightness
    luma = np.array([0.299, 0.587, 0.114])
    x = contrast * x + (1 - contrast) * (x @ luma).mean()
    x = saturation * x + (1 - saturation) * (x @ luma)[..., None]
    yiq = np.array([luma, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    y, i, q = np.moveaxis(x @ yiq.T, -1, 0)
    plane = (i + 1j * q) * np.exp(-2j * np.pi * hue)
    x = np.stack([y, plane.real, plane.imag], axis=-1) @ np.linalg.inv(yiq).T
    expected = np.clip(x, 0, 255)
    found = color_jitter(pixels, brightness, contrast, saturation, hue).numpy()
    assert np.abs(found - expected).max() < 0.501


@needs_dali
def test_hue_is_dalis() -> None:
    from nvidia.dali import Pipeline, fn

    pixels = _pixels(60, 190)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        image = fn.external_source(source=[[pixels.numpy()]], layout="HWC")
        pipeline.set_outputs(fn.hsv(image, hue=36.0, saturation=1.2))
    (turned,) = pipeline.run()
    difference = np.asarray(turned[0]).astype(int) - color_jitter(pixels, 1, 1, 1.2, 0.1).numpy()
    assert np.abs(difference).max() <= 1


def test_hue_keeps_grey_and_luma_and_a_whole_turn_changes_nothing() -> None:
    pixels = _pixels(90, 160)
    assert torch.equal(color_jitter(pixels, 1, 1, 1, 1.0), pixels)
    grey = pixels[..., :1].expand(-1, -1, 3)
    assert (color_jitter(grey, 1, 1, 3.0, 0.3).int() - grey.int()).abs().max() <= 1
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert ((color_jitter(pixels, 1, 1, 1, 0.1).float() - pixels.float()) @ luma).abs().max() < 1.5


@pytest.mark.parametrize("policy", [v2.TrivialAugmentWide, v2.RandAugment], ids=lambda policy: policy.__name__)
def test_policies_have_torchvisions_operations_and_magnitudes(policy) -> None:
    """All operations of all magnitudes that are drawn, against the space of torchvision's class and what it does."""
    side, trivial = 64, policy is v2.TrivialAugmentWide
    config = DataConfig.model_validate(
        {"resize": side, "crop": side, "augment": {"policy": "trivial" if trivial else "rand"}}
    )
    theirs, space = policy(), policy._AUGMENTATION_SPACE
    assert set(space) == set(OPERATIONS)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8))
    drawn = views(0, np.arange(12000), np.zeros(12000, dtype=np.int64), config)
    shown, seen = np.concatenate([drawn["operations"].T, drawn["magnitudes"].T]), set()
    for operation, magnitude in {*zip(shown[0], shown[2], strict=True), *zip(shown[1], shown[3], strict=True)}:
        name = OPERATIONS[int(operation)]
        magnitudes, signed = space[name]
        known = magnitudes(31, side, side)
        if known is not None:
            known = known.double() if trivial else known.double()[9:10]
            assert (known - abs(magnitude)).abs().min() < 1e-5, name
        assert magnitude >= 0 or signed
        seen.add((name, round(float(magnitude), 5)))
        if len([one for one in seen if one[0] == name]) > 6:
            continue
        expected = theirs._apply_image_or_video_transform(
            pixels, name, float(magnitude), interpolation=theirs.interpolation, fill=theirs._fill
        )
        assert torch.equal(policy_operation(pixels, name, float(magnitude)), expected), name
    counts = {name: len([one for one in seen if one[0] == name]) for name in OPERATIONS}
    assert counts["Rotate"] == (61 if trivial else 2) and counts["Posterize"] == (7 if trivial else 1)
    assert counts["Solarize"] == (31 if trivial else 1) and counts["Equalize"] == 1
    if trivial:
        assert not drawn["operations"][:, 1].any()
    per_operation = np.bincount(drawn["operations"][:, 0].astype(int), minlength=len(OPERATIONS))
    assert abs(per_operation / 12000 * len(OPERATIONS) - 1).max() < 0.15


def test_erasing_blackens_rectangles_of_the_published_sizes_as_often_as_said() -> None:
    config = DataConfig.model_validate({"resize": 50, "crop": 50, "augment": {"erasing": 0.3}})
    drawn = views(0, np.arange(3000), np.zeros(3000, dtype=np.int64), config)["erased"]
    top, left, height, width = drawn[drawn[:, 2] > 0].T
    assert abs(len(top) / 3000 - 0.3) < 0.03
    assert top.min() >= 0 and left.min() >= 0 and (top + height).max() <= 50 and (left + width).max() <= 50
    area, ratio = height * width / 2500, width / height
    assert area.min() > 0.015 and 0.3 < area.max() < 0.35 and abs(area.mean() - 0.175) < 0.01
    assert 0.25 < ratio.min() < 0.4 and 2.5 < ratio.max() < 4 and abs(np.log(ratio).mean()) < 0.06
    view = centre_views(1)
    view["erased"] = [3, 10, 20, 7]
    image = torch.full((50, 50, 3), 9, dtype=torch.uint8)
    expected = image.clone()
    expected[3:23, 10:17] = 0
    assert torch.equal(view_pixels(image, view[0], config), expected) and (image == 9).all()
