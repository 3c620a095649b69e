"""Tests of the data pipeline that every decoding backend has to pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.backends import BACKENDS


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that ``auto`` stands for while the test runs: each in turn."""
    from fpcn_dist.data.decoding import backends  # which a machine that collects the tests of the kernels need not have

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "has_dali", lambda: request.param == "dali")
        yield request.param
