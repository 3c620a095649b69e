"""How much memory this machine has left."""

from __future__ import annotations

from pathlib import Path

import psutil

_LIMIT = Path("/sys/fs/cgroup/memory.max")


def free_and_total() -> tuple[int, int]:
    """Bytes of memory that processes can still take, and of all; no more than the limit of this container."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    if _LIMIT.exists() and (text := _LIMIT.read_text().strip()).isdigit():
        total, free = min(total, int(text)), min(free, int(text))
    return free, total
