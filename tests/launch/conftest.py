"""The run that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def single(runs) -> Path:
    """The tiny recipe on one process, uninterrupted: what every other way to run it must equal."""
    return runs.train("single")
