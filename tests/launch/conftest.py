"""Fixtures: the folder of this session's runs, and the run that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory, rocks) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), rocks)


@pytest.fixture(scope="session")
def single(runs) -> Path:
    """The tiny recipe on one process, uninterrupted: what every other way to run it must equal."""
    return runs.train("single")
