"""Batches of large photographs are decoded in pieces, and are the same however they are cut."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding import backends
from fpcn_dist.data.decoding.sizes import cut, decoded_bytes
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.loader import EvalLoader, TrainLoader
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.limits import MIB

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photographs(rocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with a few images of 1 to 3 MiB among the small ones."""
    root = tmp_path_factory.mktemp("photographs")
    shutil.copytree(rocks, root, dirs_exist_ok=True)
    for number, name in enumerate(["basalt", "dolomite", "marble"] * 2):
        file = root / name / f"large{number}.jpg"
        with Image.open(root / name / f"000{number}.jpg") as image:
            image.resize((700, 500 + 200 * number)).save(file)
    return root


@pytest.fixture
def held(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decoded bytes of every request that a backend gets."""
    requests: list[int] = []
    opened = backends.open_backend(backend)

    def decoding(asked, *args):
        def noted():
            for request in asked:
                requests.append(sum(decoded_bytes(blob) or 0 for blob in request.blobs))
                yield request

        return opened.decoding(noted(), *args)

    monkeypatch.setattr("fpcn_dist.data.loader.open_backend", lambda _: opened._replace(decoding=decoding))
    return requests


def test_batches_are_the_same_in_pieces_and_each_piece_fits(photographs: Path, held: list[int]) -> None:
    batches, largest = [], []
    for mib in (4, 512):
        config = DataConfig(resize=40, crop=32, images_per_class=8, eval_batch_size=20, max_decoded_mib=mib, threads=1)
        manifest = build_manifest(photographs, config, seed=0)
        place = {"rank": 0, "world_size": 1, "device": CPU}
        train = TrainLoader(manifest, config, 3, **place)
        held.clear()
        images = [next(train).images for _ in range(3)]
        train.close()
        images += [batch.images for batch in EvalLoader.from_manifest(manifest, "train", config, **place)]
        batches.append(images)
        largest.append(max(held))
    assert largest[0] <= 4 * MIB < largest[1]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_file_that_goes_bad_in_a_later_piece_is_replaced(photographs: Path, tmp_path: Path, backend: str) -> None:
    root = Path(shutil.copytree(photographs, tmp_path / "data"))
    config = DataConfig(resize=40, crop=32, images_per_class=8, max_decoded_mib=1, threads=1)
    manifest = build_manifest(root, config, seed=0)
    loader = TrainLoader(manifest, config, 3, rank=0, world_size=1, device=CPU)
    bad = int(manifest.ids("train")[-1])
    (root / manifest.images[bad].path).write_bytes(b"no image")
    shown = [next(loader).image_ids for _ in range(3)]
    loader.close()
    assert [fault.image_id for fault in loader.replaced] == [bad]
    assert not any((ids == bad).any() for ids in shown) and {len(ids) for ids in shown} == {24}


def test_cuts() -> None:
    def parts(*megabytes: int | None, bound: int = 10) -> list[int]:
        sizes = {Blob(str(index)): size for index, size in enumerate(megabytes)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fpcn_dist.data.decoding.sizes.decoded_bytes", sizes.get)
            return [part.stop - part.start for part in cut(list(sizes), bound)]

    assert parts(1, 2, 3) == [3]
    assert parts(5, 5, 1, 9, 1) == [2, 2, 1]
    assert parts(11, 1, 12, 13) == [1, 1, 1, 1], "larger than the bound, alone"
    assert parts(1, None, 1, 1) == [1, 1, 2], "of unknown size, alone"
    assert parts() == [0]


def test_sizes_come_from_the_header_of_a_file_or_of_a_part_of_it(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((30, 50, 3), np.uint8))
    for suffix in ("jpg", "png", "webp", "bmp", "tif"):
        file = tmp_path / f"one.{suffix}"
        image.save(file)
        assert decoded_bytes(Blob(str(file))) == 3 * 30 * 50
        data = file.read_bytes()
        (tmp_path / "many").write_bytes(b"before" + data + b"behind")
        assert decoded_bytes(Blob(str(tmp_path / "many"), 6, len(data), suffix)) == 3 * 30 * 50
    (tmp_path / "text.jpg").write_text("no image")
    assert decoded_bytes(Blob(str(tmp_path / "text.jpg"))) is None
    assert decoded_bytes(Blob(str(tmp_path / "missing.jpg"))) is None
