"""The decoding backends of this machine, and commands that cannot import some packages."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
BACKENDS = [
    pytest.param("dali", marks=pytest.mark.skipif(not _HAS_DALI, reason="needs DALI")),
    "torchvision",
]

_BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {names!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def without(folder: Path, *names: str) -> dict[str, str]:
    """Variables for a child process, and its children, in which these packages seem not to be installed.

    Args:
        folder: an empty folder, which must stay for as long as the process runs.
        names: packages by their full names.
    """
    (folder / "sitecustomize.py").write_text(_BLOCKER.format(names=names))
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
