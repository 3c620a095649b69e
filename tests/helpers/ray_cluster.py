"""A Ray cluster of several nodes that come and go, from a process of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers.launching import environment

NODES = Path(__file__).with_name("ray_nodes.py")
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0" * 32,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on the loopback interface
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""For whatever joins the cluster: its token, and a lost node is found within seconds."""

Order = Callable[[str], None]


@contextlib.contextmanager
def ray_cluster(nodes: int) -> Iterator[tuple[str, Order]]:
    """Address of a cluster of that many nodes of one CPU core, and a function that gives it an order: "kill NODE_ID" or
    "add"."""
    process = subprocess.Popen(
        [sys.executable, str(NODES), str(nodes)],
        env=environment() | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    lines = iter(process.stdout.readline, "")

    def order(line: str) -> None:
        assert process.stdin
        process.stdin.write(line + "\n")
        process.stdin.flush()
        assert "done" in [next(lines).strip()]

    with process:
        address = next(line.strip() for line in lines if re.fullmatch(r"[\d.]+:\d+\s*", line))
        yield address, order
        process.stdin.close()
        process.wait(timeout=60)


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None, timeout: float = 300
) -> None:
    """Until ``condition`` holds, while ``process`` runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def node_of(log: Path) -> str:
    """Ray's name for the node where a group or a trial ran last."""
    return re.findall(r"Ray node (\w+)", log.read_text())[-1]
