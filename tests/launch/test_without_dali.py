"""The commands where DALI is not installed: torchvision decodes, says so in one line, and changes no result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fpcn_dist.data.decoding.backends import has_dali
from tests.helpers.backends import without
from tests.helpers.launching import ROOT, Runs, command, environment, losses
from tests.launch.test_resume import copy_of

NOTICE = "DALI is not installed: torchvision decodes the images, on the CPU (data.backend auto)"
needs_dali = pytest.mark.skipif(not has_dali(), reason="needs DALI")


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of processes that find no package of DALI's."""
    return without(tmp_path_factory.mktemp("blocked"), "nvidia.dali", "nvidia.nvimgcodec")


def run(argv: list[str], env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env=environment() | env, cwd=folder, capture_output=True, text=True, timeout=240)


def test_every_module_but_two_is_imported_without_dali(blocked: dict[str, str], tmp_path: Path) -> None:
    program = (
        "import importlib, pkgutil, fpcn_dist\n"
        "for module in pkgutil.walk_packages(fpcn_dist.__path__, 'fpcn_dist.'):\n"
        "    try: importlib.import_module(module.name)\n"
        "    except ImportError as error: print(module.name, error.name)"
    )
    done = run([sys.executable, "-W", "ignore", "-c", program], blocked, tmp_path)
    assert done.returncode == 0, done.stderr
    failed = [line.split() for line in done.stdout.splitlines()]
    found = [module.rpartition(".")[2] for module, missing in failed if missing.startswith("nvidia")]
    assert found == ["dali", "nvimgcodec"]


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_training_is_that_with_dali(
    runs: Runs, single: Path, blocked: dict[str, str], tmp_path: Path, launcher: str
) -> None:
    output = tmp_path / "run"
    done = run([*command(launcher), *runs.train_argv(output)], blocked, runs.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(NOTICE) == 1 and "Traceback" not in done.stderr
    # One process computes the same bits; two add up in another order.
    assert losses(output) == (losses(single) if launcher == "python" else pytest.approx(losses(single), abs=1e-4))


@needs_dali
def test_a_run_that_began_with_dali_goes_on_without(runs: Runs, single: Path, blocked: dict[str, str]) -> None:
    output = copy_of(single, "goes on without DALI", keep_checkpoints_up_to=8)
    argv = [*command("python"), *runs.train_argv(output, "--data.backend", "torchvision")]
    done = run(argv, blocked, runs.folder)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 8" in done.stdout and NOTICE not in done.stdout
    assert losses(output) == losses(single)


def test_dali_that_is_asked_for_and_missing(runs: Runs, blocked: dict[str, str], tmp_path: Path) -> None:
    argv = [*command("python"), *runs.train_argv(tmp_path / "run", "--data.backend", "dali")]
    done = run(argv, blocked, runs.folder)
    assert done.returncode == 2
    assert "data.backend dali: DALI is not installed here; pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_prediction_is_that_with_dali(runs: Runs, single: Path, blocked: dict[str, str], tmp_path: Path) -> None:
    tables = []
    for name, env in (("with", {}), ("without", blocked)):
        argv = [str(ROOT / "launch/predict.py"), str(single), str(runs.data / "marble"), "--output", name]
        done = run([sys.executable, *argv], env, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(NOTICE) == (not has_dali() or name == "without")
        tables.append((tmp_path / name / "predictions.csv").read_text())
    assert tables[0] == tables[1]


def test_the_doctor_says_who_decodes(blocked: dict[str, str], tmp_path: Path) -> None:
    done = run([sys.executable, str(ROOT / "launch/doctor.py")], blocked, tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if "decoding: " in line]
    assert line.startswith("ok ") and "by torchvision as Pillow has it" in line
    assert done.returncode == 0 and done.stderr == ""
