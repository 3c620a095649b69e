"""Processes as others can know them again: on which machine, since when, and who started them."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_CLOCK_STEP = 30.0
"""Seconds by which the start of a process may seem to have moved, because this machine's clock was set."""


@functools.cache
def _machine() -> str:
    """What no other machine is called, whatever its name: its last boot, else its installed system."""
    for path in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        try:
            if text := Path(path).read_text(encoding="utf-8").strip():
                return text
        except OSError:
            continue
    return socket.gethostname()


def place() -> tuple[str, str]:
    """The machine, and those of its processes that this one can see: containers have numbers of their own."""
    try:
        return _machine(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return _machine(), ""


def describe_self() -> dict[str, Any]:
    """This process: ``machine``, ``namespace``, ``process`` (its number) and ``started``."""
    machine, namespace = place()
    process = os.getpid()
    return {"machine": machine, "namespace": namespace, "process": process, "started": start_of(process)}


def start_of(process: int) -> float | None:
    """When a process of this machine began; ``None`` if none is seen. A number that is used again has another start.

    A process that has ended, and whose parent has not asked for its status yet, is there no more.
    """
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    except psutil.Error:
        return None


def lives(process: int, started: float | None) -> bool:
    """Whether the process that began then is seen on this machine."""
    began = start_of(process)
    return began is not None and started is not None and abs(began - started) < _CLOCK_STEP


def launcher() -> str | None:
    """Who starts these ranks again if one fails, the same at each start; ``None`` where that is not known for certain.

    It is torchrun's agent, or, over several nodes, that of a batch job: another node may have the first rank then.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" not in env:
        return None
    if env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE"):
        return f"process {os.getppid()} in {' '.join(place())}"
    return f"{env['TORCHELASTIC_RUN_ID']} of job {env['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in env else None


def describe_launch() -> dict[str, Any]:
    """By which batch job and which launcher this process was started, for :func:`is_started_again`."""
    env = os.environ
    return {
        "job": env.get("SLURM_JOB_ID"),
        "restart": int(env.get("SLURM_RESTART_COUNT", 0)),
        "launcher": launcher(),
        "run": env.get("TORCHELASTIC_RUN_ID"),
        "time": time.time(),
    }


def is_started_again(before: Mapping[str, Any]) -> bool:
    """Whether the same command, of which ``before`` tells, was started again by its launcher or its batch job."""
    now = describe_launch()
    if now["job"] is not None and before.get("job") == now["job"] and before.get("restart", 0) < now["restart"]:
        return True
    if now["launcher"] is not None:
        return before.get("launcher") == now["launcher"]
    # Over several nodes without a batch job, launchers are told apart by when they began.
    began = start_of(os.getppid())
    same = now["run"] is not None and before.get("run") == now["run"]
    return same and began is not None and before.get("time", 0.0) > began
