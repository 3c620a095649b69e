"""A private copy of the synthetic rocks, which tests may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(rocks: Path, tmp_path: Path) -> Path:
    """A private copy of the synthetic rocks."""
    return Path(shutil.copytree(rocks, tmp_path / "data"))
