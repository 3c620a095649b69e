"""This module describes where a run was computed (versions, commit, machine) for environment.json of its folder."""

from __future__ import annotations

import functools
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from fpcn_dist.runtime.ranks import Ranks

_DECODERS = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "pillow")
_PACKAGES = ("torch", "torchvision", "triton", *_DECODERS, "deepspeed", "timm", "onnxruntime")


@functools.cache
def commit() -> str | None:
    """Return the commit of the checkout that this library is used from, with "+" where files differ, or ``None``."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str:
        argv = ["git", "--no-optional-locks", "-C", str(package), *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else it is installed somewhere inside another repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_environment(ranks: Ranks) -> dict[str, object]:
    """Return what environment.json holds beside the number of ranks that the run began with."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda if cuda else None,
    }
