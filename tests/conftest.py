"""Fixtures that every room shares.

Tests of the kernels need torch, triton, numpy and pytest, and nothing else. Where a package of ``_ELSEWHERE`` is
missing, whole files that import it are skipped, and the summary names it; nothing else may be missing.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fpcn_dist.runtime.collection import collect_seldom

if not torch.cuda.is_available():
    from fpcn_kernels._interpreter import interpret

    interpret()

if TYPE_CHECKING:
    from tests.helpers.launching import Runs

_ELSEWHERE = (
    "pydantic",
    "tyro",
    "yaml",
    "nvidia",
    "deepspeed",
    "ray",
    "optuna",
    "timm",
    "torchvision",
    "PIL",
    "jinja2",
)
_ELSEWHERE += ("huggingface_hub", "pyarrow", "safetensors", "tensorboard", "matplotlib", "onnx", "onnxruntime")
_ELSEWHERE += ("onnxscript", "pytorch_grad_cam", "hypothesis", "torchmetrics", "psutil", "rich", "packaging", "sklearn")
_ELSEWHERE += ("fsspec", "s3fs", "moto", "werkzeug")


_TIMEOUTS = importlib.util.find_spec("pytest_timeout") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    if not _TIMEOUTS:
        parser.addini("timeout", "read by pytest-timeout, where it is installed")


def pytest_configure(config: pytest.Config) -> None:
    collect_seldom()
    if not _TIMEOUTS:
        config.addinivalue_line("markers", "timeout: read by pytest-timeout, where it is installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    error = report.call.excinfo.value.__cause__ if report.failed and report.call.excinfo else None
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] in _ELSEWHERE:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"Skipped: {error.name} is not installed")
    return report


@pytest.fixture(scope="session")
def rocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 x 24 synthetic photographs of 96 to 128 px; shared by all tests, so copy it before changing it."""
    from fpcn_dist.data.synthetic import generate

    root = tmp_path_factory.mktemp("rocks")
    generate(root, images_per_class=24, seed=7, min_side=96, max_side=128)
    return root


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, rocks: Path) -> Runs:
    """Starts the real commands on the photographs of ``rocks``."""
    from tests.helpers.launching import Runs

    return Runs(tmp_path_factory.mktemp("runs"), rocks)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the tests cache, here and in their child processes, out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_process_left(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End what a test started and did not wait for, which would disturb the tests after it, and let the test fail."""
    if "cluster" in request.fixturenames:  # whose nodes a test may start again for the tests after it
        yield
        return
    started: list[subprocess.Popen] = []
    begin = subprocess.Popen.__init__

    def noted(process: subprocess.Popen, *args, **options) -> None:
        begin(process, *args, **options)
        started.append(process)

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    yield
    left = [process for process in started if process.poll() is None]
    for process in left:
        process.kill()
        process.wait()
    for process in started:
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    assert not left, f"left running: {[process.args for process in left]}"


_SLOW = {"launch", "slurm"}
"""Folders of tests that start the real commands, or clusters. Slow tests elsewhere are marked where they stand."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts commands, before tests are chosen by ``-m "not slow"``; begin with what takes long.

    Files of slow tests often wait. Begun last, they would leave the other workers idle at the end.

    Tests marked ``gpu`` need a CUDA device; ``pytest -m gpu`` runs them alone.
    """
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in _SLOW:
            item.add_marker(pytest.mark.slow)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
