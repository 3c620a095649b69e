"""The loader benchmark runs as a user runs it, and shows all loaders in one table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fpcn_dist.data.backends import has_dali

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
