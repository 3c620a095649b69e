"""The fault campaign itself, with few faults and of quick kinds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT
from tests.slurm.slurm import MISSING

pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(400)]

CAMPAIGN = [sys.executable, str(ROOT / "tests/slurm/campaign.py")]
QUICK = ["rank_killed", "newest_checkpoint_damaged", "network_cut_briefly"]


def test_a_run_survives_and_every_recovery_is_in_the_table(tmp_path: Path):
    table = tmp_path / "faults.md"
    argv = [*CAMPAIGN, "--faults", "3", "--kinds", ",".join(QUICK), "--output", str(table)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "weights are the undisturbed run's" in done.stdout
    rows = re.findall(r"\| (\d) \| ([a-z ]+) \|.*\| (\d+\.\d) \|", table.read_text())
    assert [number for number, _, _ in rows] == ["1", "2", "3"]
    assert sorted(kind.replace(" ", "_") for _, kind, _ in rows) == sorted(QUICK)
    assert all(0 < float(seconds) < 120 for _, _, seconds in rows)


def test_a_kind_that_there_is_not_is_refused():
    done = subprocess.run([*CAMPAIGN, "--kinds", "flood"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no such kinds: flood; choose from rank_killed" in done.stderr
