"""The loader benchmark runs as a user runs it, and shows all loaders in one table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._augmentations import AUGMENTATIONS, by_v2
from benchmarks.loader import augmentation_benchmark
from fpcn_dist.data.decoding.backends import has_dali
from fpcn_dist.recipe.schema import DataConfig

ROOT = Path(__file__).parents[2]


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_table_of_all_loaders(rocks: Path) -> None:
    sizes = ("--config.resize", "64", "--config.crop", "56")
    run = _run("loader", "--data", str(rocks), "--images", "80", "--repeats", "1", *sizes)
    assert run.returncode == 0, run.stderr
    assert "80 images, resize 64, crop 56" in run.stdout
    rows = [line for line in run.stdout.splitlines() if "PIL" in line or "decode_jpeg" in line or "fpcn_dist" in line]
    assert len(rows) == 3 + has_dali()


def test_table_of_all_augmentations(rocks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DataConfig(resize=24, crop=16, threads=1)
    costs = augmentation_benchmark(rocks, config, images=40, repeats=1)
    shown = capsys.readouterr().out
    assert len(costs) == len(AUGMENTATIONS) and "40 images, resize 24, crop 16" in shown
    for name, pair in costs.items():
        assert all(len(cost.cpu_ms) == 1 and cost.cpu_ms[0] > 0 for cost in pair)
        assert name in shown


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_both_sides_make_images_of_the_crop(rocks: Path, name: str) -> None:
    config = DataConfig(resize=24, crop=16).changed(**AUGMENTATIONS[name])
    image = by_v2(config)(str(rocks / "dolomite" / "0001.jpg"))
    assert image.shape == (3, 16, 16) and image.isfinite().all()


@pytest.mark.slow
def test_folder_without_images(tmp_path: Path) -> None:
    run = _run("loader", "--data", str(tmp_path))
    assert run.returncode == 2
    assert (
        run.stderr.strip()
        == f"error: --data {tmp_path}: there are no usable images in it; give a folder of photographs"
    )


def test_every_benchmark_is_listed() -> None:
    shown = _run("--help").stdout
    for name in ("masked_pool", "pair_contrast", "step", "gpu", "table", "loader", "distill", "scaling"):
        assert f"    {name} " in shown


def test_unknown_benchmark() -> None:
    run = _run("loading")
    assert run.returncode == 2 and run.stderr.startswith("there is no benchmark 'loading'")
