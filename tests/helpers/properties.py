"""hypothesis for tests of the kernels, which also run where it is not installed: property tests are skipped there."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    st = MagicMock()

    def given(*_, **__):
        return pytest.mark.skip(reason="hypothesis is not installed")

    settings = given

__all__ = ["given", "settings", "st"]
