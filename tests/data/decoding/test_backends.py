"""The backends beside one another: the same images, batches and verdicts; which is taken; threads that end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fpcn_dist.data.batch import BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding import backends
from fpcn_dist.data.decoding.backends import has_dali, open_backend
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.check.images import check_images
from fpcn_dist.data.loader import EvalLoader, TrainLoader
from fpcn_dist.data.resizing import view_crop
from fpcn_dist.data.views import centre_views
from fpcn_dist.recipe.preprocessing import IMAGENET, Interpolation
from fpcn_dist.recipe.schema import DataConfig, DecodingBackend
from fpcn_dist.runtime.errors import UserError
from tests.helpers.views import crop_views

needs_dali = pytest.mark.skipif(not has_dali(), reason="needs DALI")
CPU = torch.device("cpu")
LEVEL = 1.01 / 255
"""One grey level, and a little for arithmetic."""


def _decoded(paths: list[Path], crops: np.ndarray, config: DataConfig) -> Tensor:
    """[B, 3, crop, crop] as a backend gives them to the network."""
    request = BatchRequest(Blob.of_files(paths), crop_views(crops, config))
    decoding = open_backend(config.backend).decoding(iter([request]), config, CPU, len(paths), 2)
    with contextlib.closing(decoding):
        return decoding.next()


def _photographs(folder: Path) -> list[Path]:
    """A photograph in every form that a decoder may treat in its own way."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((233, 171)))
    colour = Image.fromarray(np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8))
    grey, clear = colour.convert("L"), colour.copy()
    clear.putalpha(grey)
    forms = {
        **{f"rgb.{suffix}": colour for suffix in ("jpg", "png", "webp", "bmp", "tif")},
        **{f"grey.{suffix}": grey for suffix in ("jpg", "png", "bmp", "tif")},
        **{f"alpha.{suffix}": clear for suffix in ("png", "webp", "tif")},
        **{f"palette.{suffix}": colour.convert("P") for suffix in ("png", "bmp")},
        **{f"cmyk.{suffix}": colour.convert("CMYK") for suffix in ("jpg", "tif")},
        **{f"bits.{suffix}": grey.convert("1") for suffix in ("png", "bmp")},
        "grey-alpha.png": grey.convert("LA"),
    }
    for name, image in forms.items():
        image.save(folder / name)
    colour.save(folder / "progressive.jpg", progressive=True, quality=40, subsampling=2)
    colour.save(folder / "halved.jpg", subsampling=1)
    colour.save(folder / "packed.tif", compression="tiff_lzw")
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("jpg", "png", "webp", "tif"):
            colour.save(folder / f"turned{orientation}.{suffix}", exif=exif)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(rng.integers(0, 65536, (60, 80)).astype(np.uint16)).save(folder / name)
    return sorted(folder.iterdir())


@needs_dali
@pytest.mark.parametrize(("resize", "crop", "interpolation"), [(104, 96, "bilinear"), (300, 120, "bicubic")])
def test_backends_give_the_same_images_in_every_form(
    tmp_path: Path, resize: int, crop: int, interpolation: Interpolation
) -> None:
    paths = _photographs(tmp_path)
    rng = np.random.default_rng(2)
    crops = np.stack([*rng.integers(0, resize - crop + 1, (2, len(paths))), rng.integers(0, 2, len(paths))], axis=1)
    config = DataConfig(resize=resize, crop=crop, interpolation=interpolation)
    dali, ours = (_decoded(paths, crops, config.changed(backend=name)) for name in ("dali", "torchvision"))
    assert dali.shape == ours.shape == (len(paths), 3, crop, crop) and ours.is_contiguous()
    for path, one, other in zip(paths, dali, ours, strict=True):
        difference = ((one - other).abs() * torch.tensor(IMAGENET.std).view(3, 1, 1)).max()
        assert difference < 1e-6, path.name
    for name in ("dali", "torchvision"):
        assert all(check.ok for check in check_images(Blob.of_files(paths), 10**8, backend=name))


def _by_both_resizers(sources: list[np.ndarray], corners: np.ndarray, config: DataConfig) -> tuple[Tensor, Tensor]:
    """[B, crop, crop, 3] grey levels by the GPU's resizer, here on the CPU, and by the CPU's."""
    from nvidia.dali import Pipeline, fn

    from fpcn_dist.data.decoding.dali import resize_by_dali

    pipeline = Pipeline(batch_size=len(sources), num_threads=1, device_id=None)
    with pipeline:
        between = ((corners + side).astype(np.float32) / config.resize for side in (0, config.crop))
        batch = [(sources, *between)]
        decoded, start, end = fn.external_source(source=batch, num_outputs=3, layout=["HWC", None, None])
        pipeline.set_outputs(resize_by_dali(decoded, start, end, config))
    (dali,) = (torch.from_dlpack(out.as_tensor()).int() for out in pipeline.run())
    views = crop_views(np.pad(corners, ((0, 0), (0, 1))), config)
    cut = [view_crop(torch.from_numpy(source), view, config) for source, view in zip(sources, views, strict=True)]
    ours = torch.stack(cut).int()
    assert dali.shape == ours.shape == (len(sources), config.crop, config.crop, 3)
    return dali, ours


@needs_dali
@pytest.mark.parametrize(("resize", "crop"), [(64, 56), (200, 160)])
def test_both_resizers_agree(rocks: Path, resize: int, crop: int) -> None:
    """One grey level, away from the edge of the whole image."""
    sources = [np.array(Image.open(path)) for path in sorted(rocks.rglob("*.jpg"))[::6]]
    corners = np.random.default_rng(1).integers(1, resize - crop, size=(len(sources), 2), dtype=np.int32)
    dali, ours = _by_both_resizers(sources, corners, DataConfig(resize=resize, crop=crop))
    assert (dali - ours).abs().max() <= 1


@needs_dali
@pytest.mark.parametrize(("resize", "crop"), [(64, 56), (200, 160)])
def test_both_resizers_agree_on_the_cubic_filter_but_where_it_overshoots(rocks: Path, resize: int, crop: int) -> None:
    """The CPU's clips after each of its two passes, as Pillow's does; the GPU's once, as arithmetic has it."""
    sources = [np.array(Image.open(path)) for path in sorted(rocks.rglob("*.jpg"))[::6]]
    start = (resize - crop) // 2
    corners = np.full((len(sources), 2), start, dtype=np.int32)
    dali, ours = _by_both_resizers(sources, corners, DataConfig(resize=resize, crop=crop, interpolation="bicubic"))
    whole = [torch.from_numpy(source).permute(2, 0, 1)[None].double() for source in sources]
    whole = [F.interpolate(image, (resize, resize), mode="bicubic", antialias=True) for image in whole]
    exact = torch.cat(whole).clamp(0, 255).permute(0, 2, 3, 1)[:, start : start + crop, start : start + crop]
    assert (dali - exact).abs().max() < 0.6
    assert ((dali - ours).abs() > 1).double().mean() < 1e-3


@needs_dali
def test_backends_give_the_same_batches(rocks: Path) -> None:
    config = DataConfig(resize=80, crop=64, images_per_class=4, eval_batch_size=5)
    manifests, batches = [], []
    for name in ("dali", "torchvision"):
        chosen = config.changed(backend=name)
        manifest = build_manifest(rocks, chosen, seed=0)
        place = {"rank": 0, "world_size": 1, "device": CPU}
        train = TrainLoader(manifest, chosen, 5, start_step=3, **place)
        val = EvalLoader.from_manifest(manifest, "val", chosen, **place)
        manifests.append(manifest)
        batches.append([next(train), next(train), *val])
        train.close()
    assert manifests[0] == manifests[1] and len(batches[0]) == len(batches[1]) > 3
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.image_ids, other.image_ids) and torch.equal(one.crops, other.crops)
        assert (one.images - other.images).abs().max() < LEVEL / max(IMAGENET.std)


@pytest.fixture
def files(rocks: Path) -> list[str]:
    return [str(path) for path in sorted(rocks.rglob("*.jpg"))]


def _requests(files: list[str], asked: list[str]) -> Iterator[BatchRequest]:
    for file in files:
        asked.append(file)
        yield BatchRequest([Blob(file)], centre_views(1))


@pytest.fixture
def threads() -> Callable[[], int]:
    """Counts the decoding threads that the test has started; those of earlier tests may still be ending."""
    before = set(threading.enumerate())
    return lambda: sum(thread.name.startswith("decoding") for thread in set(threading.enumerate()) - before)


def test_no_more_batches_are_under_way_than_said(files: list[str]) -> None:
    asked: list[str] = []
    config = DataConfig(resize=32, crop=32)
    decoding = open_backend("torchvision").decoding(_requests(files[:5], asked), config, CPU, 1, 2)
    with contextlib.closing(decoding):
        assert asked == []
        for taken in range(1, 6):
            decoding.next()
            assert len(asked) == min(taken + 1, 5)
        with pytest.raises(StopIteration):
            decoding.next()


def test_closing_stops_the_threads(rocks: Path, threads: Callable[[], int]) -> None:
    config = DataConfig(backend="torchvision", images_per_class=4, eval_batch_size=4, val_fraction=0.2, threads=3)
    manifest = build_manifest(rocks, config, seed=0)
    place = {"rank": 0, "world_size": 1, "device": CPU}
    train = TrainLoader(manifest, config, 0, **place)
    next(train)
    assert threads() == 3
    train.close()
    assert threads() == 0
    given_up = iter(EvalLoader.from_manifest(manifest, "val", config, **place))
    next(given_up)
    assert threads() > 0
    given_up.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threads() == 0
    list(EvalLoader.from_manifest(manifest, "val", config, **place))
    assert threads() == 0


def test_a_file_that_turns_bad_leaves_no_threads_behind(
    tmp_path: Path, files: list[str], threads: Callable[[], int]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(files[0]).read_bytes()[:-300])
    config = DataConfig(backend="torchvision", resize=32, crop=32, eval_batch_size=1)
    paths = [Path(files[0]), broken, Path(files[1])]
    loader = EvalLoader(Blob.of_files(paths), np.zeros(3), np.arange(3), config, rank=0, world_size=1, device=CPU)
    with pytest.raises(UserError, match=f"image {broken}: the image data are truncated or damaged"):
        list(loader)
    assert threads() == 0


@pytest.mark.parametrize(
    ("name", "installed", "expected"),
    [("auto", True, "dali"), ("auto", False, "torchvision"), ("torchvision", True, "torchvision")],
)
def test_auto_is_dali_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, name: DecodingBackend, installed: bool, expected: str
) -> None:
    if expected == "dali":
        pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(backends, "has_dali", lambda: installed)
    assert open_backend(name).name == expected


def test_dali_that_is_missing_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_dali", lambda: False)
    with pytest.raises(UserError) as error:
        open_backend("dali")
    assert str(error.value) == (
        "data.backend dali: DALI is not installed here; pip install 'fpcn-dist[cuda13]' (or cuda12), or set "
        "data.backend to auto or torchvision"
    )
