"""Measurements in processes of their own, where it can be had in a network of their own."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "KINETO_LOG_LEVEL": "6",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Ranks on the CPU, on the loopback interface, that do not talk about it."""


def run_module(module: str, request: Any, *, prefix: Sequence[str] = ()) -> Any:
    """``python -m module REQUEST``; gives what it prints in its last line. Both are JSON.

    Raises:
        RuntimeError: it failed; with all that it wrote to stderr.
    """
    argv = [*prefix, sys.executable, "-m", module, json.dumps(request)]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, env=os.environ | _ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(f"{module} failed with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def own_network() -> tuple[str, ...] | None:
    """What before a command gives it a loopback interface that nobody else uses; ``None`` where that is not allowed."""
    if shutil.which("unshare"):
        for options in ((), ("--map-root-user",)):
            prefix = ("unshare", "--net", *options)
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
    return None


def raise_loopback() -> None:
    """In a new network the loopback interface is down."""
    with socket.socket() as any_socket:
        name, flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0)))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", name, flags | _IFF_UP))


def loopback_bytes() -> int:
    """Sent so far on the loopback interface by everyone in this network, headers included."""
    with open("/proc/net/dev") as lines:
        (counters,) = (line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
    return int(counters[8])
