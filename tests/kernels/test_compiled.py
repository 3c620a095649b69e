"""The kernels compile for every supported GPU at the shapes of production, without spills. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fpcn_kernels._launch import interpreting, recording

from benchmarks import _compile

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_no_kernel_spills_or_outgrows_the_multiprocessor(arch: int, tmp_path: Path) -> None:
    # A process of its own, as kernels that were imported for the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.compile_production", str(arch)]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    answer = json.loads(child.stdout)
    needs = answer["needs"]
    assert len(needs) > 20
    for need in needs:
        assert need["stack_bytes"] == 0, need
        assert need["registers"] <= 255, need
        assert need["shared_bytes"] <= _compile.SHARED_LIMITS[arch], need
    # What docs/kernels.md says; float32 cannot do with less than 4 K - 1 = 11.
    totals = {precision: sum(kernels.values()) for precision, kernels in answer["instructions"].items()}
    bounds = (18, 8.2) if arch >= 90 else (19, 9.5)
    assert 11 < totals["float32"] <= bounds[0] and totals["float16"] <= bounds[1], answer["instructions"]


@pytest.mark.skipif(not interpreting(), reason="needs kernels that were imported for the interpreter")
def test_interpreted_kernel_cannot_be_compiled() -> None:
    from fpcn_kernels.pooling import backend_triton

    with recording() as records:
        backend_triton.forward(torch.empty(1, 3, 2, 2, device="meta"), None, 0.0, False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        _compile.compile_needs(records[0], 90)
