"""What a process that trains need not wait for before it starts."""

from __future__ import annotations

import subprocess
import sys

LATER = {"matplotlib", "onnx", "onnxruntime", "sklearn", "ray", "deepspeed", "timm", "torchvision"}
"""Imported where a figure is drawn, a network of theirs is built, or an engine or cluster is asked for."""


def test_a_training_imports_only_what_every_training_needs():
    program = f"import sys, fpcn_dist.training.loop; print(sorted({LATER} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
