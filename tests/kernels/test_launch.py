"""Which configuration a kernel runs with, and on which device."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from fpcn_kernels import _launch

TABLE = [{"TILE": 8}, {"TILE": 16}, {"TILE": 32}]


@pytest.fixture
def tuning(monkeypatch):
    """Timings that need no GPU: of TABLE, the first is slow, the second fast, and the third does not fit."""
    from triton import testing
    from triton.runtime.errors import OutOfResources

    timed = []

    def fake_bench(run: functools.partial, **_):
        timed.append(run.args[0]["TILE"])
        if timed[-1] == 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return {8: 2.0, 16: 1.0}[timed[-1]]

    monkeypatch.setattr(testing, "do_bench", fake_bench)
    monkeypatch.setattr(_launch, "interpreting", lambda: False)
    monkeypatch.setattr(_launch, "_tuned", {})
    monkeypatch.setenv(_launch.AUTOTUNE, "1")
    return timed


def _runs(*keys):
    runs = []
    for key in keys:
        _launch.choose(key, TABLE, runs.append)
    return [run["TILE"] for run in runs]


def test_the_known_good_configuration_unless_asked():
    assert _runs(("kernel", 336), ("kernel", 512)) == [8, 8]


def test_tuned_once_for_a_shape_and_dtype(tuning):
    assert _runs(("kernel", 336), ("kernel", 336), ("kernel", 512)) == [16, 16, 16]
    assert tuning == [8, 16, 32] * 2


def test_a_recording_does_not_tune(tuning):
    with _launch.recording():
        assert _runs(("kernel", 336)) == [8]
    assert tuning == []


class FakeKernel:
    """Remembers which device was current when it was launched."""

    def __init__(self, current):
        self.current, self.launches = current, []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((self.current[-1], grid, arguments, constants))


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch):
    current = ["cuda:0"]

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(str(tensor.device))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernel = FakeKernel(current)
    with FakeTensorMode():
        tensor = torch.empty(3, device="cuda:1")
    _launch.launch(kernel, (4, 2), 5, tensor, TILE=8)
    assert kernel.launches == [("cuda:1", (4, 2), (5, tensor), {"TILE": 8})]
    assert current == ["cuda:0"]


def test_a_launch_on_the_cpu_needs_no_cuda():
    kernel = FakeKernel(["cpu"])
    _launch.launch(kernel, (1,), torch.empty(3))
    assert len(kernel.launches) == 1
