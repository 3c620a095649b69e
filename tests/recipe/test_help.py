"""What a command need not import to say what its options are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "timm", "nvidia", "onnxruntime", "matplotlib", "sklearn", "ray", "deepspeed", "optuna")
PROGRAM = f"""
import contextlib, io, runpy, sys
for path in sys.argv[1:]:
    sys.argv, shown = [path, "--help"], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
        runpy.run_path(path, run_name="__main__")
    assert "usage:" in shown.getvalue(), path
    print(path, *[name for name in {HEAVY} if name in sys.modules])
"""


def test_help_imports_nothing_that_takes_seconds():
    commands = sorted(
        str(path.relative_to(ROOT)) for folder in ("launch", "tune") for path in ROOT.glob(f"{folder}/*.py")
    )
    done = subprocess.run([sys.executable, "-c", PROGRAM, *commands], capture_output=True, text=True, cwd=ROOT)
    assert len(commands) >= 10
    assert done.stdout.splitlines() == commands, done.stderr
