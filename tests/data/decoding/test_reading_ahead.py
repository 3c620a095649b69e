"""Reading ahead of DALI's pipeline."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("nvidia.dali")

from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding import dali
from fpcn_dist.data.views import centre_views
from fpcn_dist.recipe.schema import DataConfig


def test_whoever_drops_a_pipeline_waits_for_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python collects it in any thread, where to wait for a thread may be to wait for ever."""
    reading, finish = threading.Event(), threading.Event()

    def read(blob: Blob) -> bytes:
        if blob.path == "slow":
            reading.set()
            finish.wait(30)
        return b""

    monkeypatch.setattr(dali, "_read", read)
    paths = ["a"] * BATCHES_IN_FLIGHT + ["slow"]
    requests = iter([BatchRequest([Blob(path)], centre_views(1)) for path in paths])
    ahead = dali.read_ahead(requests, DataConfig(), threads=1)
    next(ahead)
    assert reading.wait(30)
    dropping = threading.Thread(target=ahead.close)  # pyright: ignore[reportAttributeAccessIssue]
    dropping.start()
    dropping.join(10)
    waits = dropping.is_alive()
    finish.set()
    dropping.join()
    assert not waits
