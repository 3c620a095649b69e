"""Synthetic rocks: the same seed draws the same files, and mean colour alone does not tell the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fpcn_dist.data.synthetic import TEXTURES, generate


def _contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.jpg")}


def test_same_seed_same_files_and_a_larger_set_contains_the_smaller(tmp_path: Path) -> None:
    generate(tmp_path / "a", images_per_class=2, seed=3, min_side=40, max_side=60)
    generate(tmp_path / "b", images_per_class=3, seed=3, min_side=40, max_side=60)
    generate(tmp_path / "c", images_per_class=2, seed=4, min_side=40, max_side=60)
    a, b, c = (_contents(tmp_path / name) for name in "abc")
    assert a.items() < b.items()
    assert a.keys() == c.keys() and not set(a.values()) & set(c.values())


def test_images_are_jpeg_of_the_asked_sizes(rocks: Path) -> None:
    sizes = set()
    for name in TEXTURES:
        files = sorted((rocks / name).iterdir())
        assert [file.name for file in files] == [f"{i:04d}.jpg" for i in range(24)]
        for file in files:
            with Image.open(file) as image:
                assert image.format == "JPEG" and image.mode == "RGB"
                sizes.update(image.size)
    assert min(sizes) >= 96 and max(sizes) <= 128 and len(sizes) > 10


def test_mean_colour_does_not_give_the_class_away(tmp_path: Path) -> None:
    generate(tmp_path, images_per_class=60, seed=0, min_side=64, max_side=64)
    colours = np.array(
        [
            [np.asarray(Image.open(tmp_path / name / f"{i:04d}.jpg")).mean(axis=(0, 1)) / 255 for i in range(60)]
            for name in TEXTURES
        ]
    )
    features = np.concatenate([colours, colours**2, np.ones((3, 60, 1))], axis=-1)
    targets = np.broadcast_to(np.eye(3)[:, None], (3, 60, 3))
    weights = np.linalg.lstsq(features[:, ::2].reshape(-1, 7), targets[:, ::2].reshape(-1, 3), rcond=None)[0]
    predicted = (features[:, 1::2] @ weights).argmax(axis=-1)
    assert (predicted == np.arange(3)[:, None]).mean() < 0.7
