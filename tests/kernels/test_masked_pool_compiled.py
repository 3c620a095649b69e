"""The launches of masked_pool compile once for all batch sizes, and load as widely as a thread can. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def _compiled(tmp_path: Path, *words: str) -> dict[str, Any]:
    # A process of its own, as kernels that were imported for the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.compile_masked_pool", *words]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_no_batch_size_compiles_anew(tmp_path: Path) -> None:
    kernels = {"nhwc {}": 3, "nchw {'largest': True, 'companion': True}": 4}
    found = _compiled(tmp_path, "specialisations")
    assert len(found) == 6
    for call, keys in found.items():
        assert len(keys) == 6
        assert len(keys[0]) == kernels.get(call, len(keys[0]))
        assert all(other == keys[0] for other in keys), call


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_features_are_loaded_16_bytes_a_thread(arch: int, tmp_path: Path) -> None:
    found = _compiled(tmp_path, "loads", str(arch))
    assert found["nchw"].pop("fold") == 2 and found["nhwc"].pop("fold") == 1
    for layout, kernels in found.items():
        assert set(kernels) == {"_mask_kernel", "_pool_kernel"}
        for widths in kernels.values():
            assert set(widths) == {"16"} and widths["16"] >= 13, (layout, kernels)
