"""An object store in this process, and no pauses between attempts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fpcn_dist.data.remote import store
from tests.helpers.objects import FaultyStore


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that no other test has written to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fpcn-dist" / "objects"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were paused between attempts, instead of pausing."""
    paused: list[float] = []
    monkeypatch.setattr(store, "sleep", paused.append)
    return paused


@pytest.fixture
def faulty(own_cache: Path, pauses: list[float]) -> Iterator[type[FaultyStore]]:
    """The object store ``faulty://``, empty."""
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    FaultyStore.reset()
    yield FaultyStore
    FaultyStore.reset()
