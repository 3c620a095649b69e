"""Tests of the kernels need torch, triton, numpy and pytest: no other package that the project uses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("pydantic", reason="this is a bare machine")

ROOT = Path(__file__).parents[2]
NEEDED = {"torch", "triton", "numpy", "pytest"}
CHILD = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # None: as if it were not installed
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def _blocked() -> list[str]:
    """Give the import names of all that the project asks for, less those of ``NEEDED`` and of what these ask for."""
    modules = defaultdict(list)
    for module, distributions in metadata.packages_distributions().items():
        for name in distributions:
            modules[_canonical(name)].append(module)
    others = _asked("fpcn-dist", extras=True) - NEEDED - {name for needed in NEEDED for name in _asked(needed)}
    assert {"pydantic", "tyro", "timm", "rich", "hypothesis", "pytest-timeout"} <= others
    # PyTorch's own libraries are in the package nvidia, too.
    return sorted({module for name in others for module in modules[name]} - {"nvidia"}) + ["nvidia.dali"]


def _asked(distribution: str, extras: bool = False) -> set[str]:
    lines = metadata.requires(distribution) or []
    return {_canonical(re.split(r"[^\w.-]", line)[0]) for line in lines if extras or "extra ==" not in line}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pytest(*words: str) -> str:
    command = [sys.executable, "-c", CHILD, ",".join(_blocked()), "-p", "no:cacheprovider", "-q", *words]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


@pytest.mark.slow
def test_gpu_tests_of_the_kernels_are_collected() -> None:
    shown = _pytest("tests/kernels", "--collect-only", "-m", "gpu")
    assert "test_on_gpu.py" in shown and "error" not in shown and "is not installed" not in shown


@pytest.mark.slow
def test_whole_tree_is_collected_and_says_what_is_missing() -> None:
    shown = _pytest("--collect-only", "-m", "gpu")
    assert "kernels/test_on_gpu.py" in shown and "error" not in shown
    assert "pydantic is not installed" in shown


@pytest.mark.slow
def test_kernels_pass() -> None:
    files = ("test_launch.py", "test_masked_pool.py", "test_pair_contrast_triton.py")
    chosen = "by_hand or launch or early_or_late or permuting"
    shown = _pytest(*(f"tests/kernels/{file}" for file in files), "-k", chosen, "-m", "not gpu")
    assert "passed" in shown and "1 skipped" in shown and "hypothesis is not installed" in shown
