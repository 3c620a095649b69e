"""The runs that others are compared with, or go on from. None of them is started twice."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def single(runs) -> Path:
    """The tiny recipe on one process, uninterrupted: what every other way to run it must equal."""
    return runs.shared("single")


@pytest.fixture(scope="session")
def ddp(runs) -> Path:
    """The same on two ranks of torchrun."""
    return runs.shared("ddp", launcher="torchrun")


@pytest.fixture(scope="session")
def zero2(runs) -> Path:
    """The same on two ranks of DeepSpeed."""
    return runs.shared("zero2", "--engine.name", "deepspeed", "--engine.zero-stage", "2", launcher="deepspeed")
