"""Several machines on this one: each has network, host name, mount and process namespaces of its own.

Machine 0 is the controller. The others, the nodes, live in namespaces inside its own, and a bridge joins them all. The
controller's process number 1 ends when its standard input does, and the kernel then kills all the others: nothing
outlives the test, even where the test is killed.

They share the machine's file system, as on a cluster with one home folder. A node's own are /dev/shm, /var/spool and
/tmp, save what /tmp already held when the node started.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from typing_extensions import Self

CONTROLLER_ADDRESS = "10.99.0.254"
_NAMESPACES = ["--net", "--uts", "--mount", "--pid"]

# Only the old /proc tells process 1 its number outside of its namespaces, by which others enter them.
_OPEN = "set -e; read -r pid _ < /proc/self/stat; mount -t proc proc /proc"
_REPORT = 'echo "$pid"; exec >&2'

_CONTROLLER = rf"""
{_OPEN}
hostname controller
ip link set lo up
ip link add cluster type bridge
ip address add {CONTROLLER_ADDRESS}/24 dev cluster
ip link set cluster up
mount --bind hosts /etc/hosts
mount -t tmpfs tmpfs /run
eval "$1"
{_REPORT}
read -r _
"""

# Two nodes that shared /tmp would fight for the sockets that Ray makes there.
_NODE = rf"""
{_OPEN}
hostname "$2"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /var/spool
mount -t tmpfs tmpfs /mnt
shopt -s dotglob nullglob
for shared in /tmp/*; do
    own=/mnt/${{shared##*/}}
    if [ -d "$shared" ]; then mkdir "$own"; elif [ -e "$shared" ]; then touch "$own"; else continue; fi
    mount --rbind "$shared" "$own"
done
chmod 1777 /mnt
mount --move /mnt /tmp
{_REPORT}
read -r _
ip link set lo up
ip address add "$3/24" dev eth0
ip link set eth0 up
eval "$1"
wait
"""


def missing(*programs: str) -> str | None:
    """Why there can be no machines with these programs here, or ``None`` where there can."""
    if absent := [name for name in (*programs, "unshare", "nsenter", "ip") if shutil.which(name) is None]:
        return f"needs {', '.join(absent)} on the PATH"
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    allowed = subprocess.run(["unshare", *_NAMESPACES, "--fork", "true"], stderr=subprocess.DEVNULL).returncode == 0
    return None if allowed else "needs leave to make namespaces"


def address(node: int) -> str:
    return f"10.99.0.{node}"


class _Machine(NamedTuple):
    process: subprocess.Popen[str]
    pid: str
    """Of its process 1 where that was started: on this machine for the controller, on the controller for a node."""


class Machines:
    """A controller and nodes ``node1``, ``node2``, ..., up between ``with`` and the end of its block.

    Args:
        folder: holds their logs, and is where commands are executed by default.
        nodes: how many.
        daemons: shell commands that start the daemons of the controller, and of a node, in the background.
        env: variables of all processes, beside those of this one.

    Raises:
        RuntimeError: from any method: a command failed; the message has what it printed.
    """

    def __init__(self, folder: Path, nodes: int, daemons: tuple[str, str], env: Mapping[str, str]) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.nodes = range(1, nodes + 1)
        self._daemons, self._environment = daemons, {**os.environ, **env}
        hosts = {"localhost": "127.0.0.1", "controller": CONTROLLER_ADDRESS}
        hosts |= {f"node{node}": address(node) for node in self.nodes}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        self._machines: dict[int, _Machine] = {}

    def __enter__(self) -> Self:
        try:
            self._boot(0, _CONTROLLER, self._daemons[0])
            for node in self.nodes:
                self.start_node(node)
            self.wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop()

    def wait_until_up(self) -> None:
        """Called when all machines have been started."""

    def run(
        self,
        *command: str,
        node: int = 0,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Execute a command on the controller, or on a node, in ``cwd`` (default: the folder).

        Args:
            env: further variables.
            check: raise where it fails.
            timeout: seconds.
        """
        argv = [*self._inside(node), "env", f"--chdir={cwd or self.folder}", *command]
        variables = {**self._environment, **(env or {})}
        done = subprocess.run(argv, env=variables, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start_node(self, node: int) -> None:
        """Switch a node on."""
        machine = self._boot(node, _NODE, self._daemons[1], f"node{node}", address(node))
        # The same hardware address after every start, as the other nodes remember it.
        peer = ["peer", "name", "eth0", "address", f"02:00:00:00:00:{node:02x}", "netns", machine.pid]
        self.run("ip", "link", "add", f"node{node}", "type", "veth", *peer)
        self.run("ip", "link", "set", f"node{node}", "master", "cluster", "up")
        assert machine.process.stdin
        machine.process.stdin.write("connected\n")
        machine.process.stdin.close()

    def kill_node(self, node: int) -> None:
        """Cut a node's power: its processes die, and nobody hears a last word from them."""
        machine = self._machines[node]
        self.run("ip", "link", "delete", f"node{node}")
        self.run("kill", "-9", machine.pid)
        machine.process.wait(10)
        del self._machines[node]

    def cut_network(self, node: int) -> None:
        """Pull a node's network cable: what runs there runs on, alone."""
        self.run("ip", "link", "set", f"node{node}", "down")

    def mend_network(self, node: int) -> None:
        """Plug the cable in again."""
        self.run("ip", "link", "set", f"node{node}", "up")

    def log(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))

    def _inside(self, machine: int) -> list[str]:
        path = [0] if machine == 0 else [0, machine]
        return [word for step in path for word in ("nsenter", f"--target={self._machines[step].pid}", *_NAMESPACES)]

    def _boot(self, machine: int, script: str, *args: str) -> _Machine:
        where = self._inside(0) if machine else []
        argv = [*where, "unshare", *_NAMESPACES, "--fork", "--kill-child", "bash", "-c", script, "bash", *args]
        with open(self.folder / f"machine{machine}.log", "a") as log:
            process = subprocess.Popen(
                argv,
                env=self._environment,
                cwd=self.folder,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._machines[machine] = _Machine(process, "")
        assert process.stdout
        with process.stdout:
            pid = process.stdout.readline().strip()
        if not pid:
            raise RuntimeError(f"machine {machine} did not start\n{self.log()}")
        self._machines[machine] = _Machine(process, pid)
        return self._machines[machine]

    def _stop(self) -> None:
        for _, machine in sorted(self._machines.items()):  # the controller first, which takes the nodes along
            assert machine.process.stdin
            machine.process.stdin.close()
            try:
                machine.process.wait(10)
            except subprocess.TimeoutExpired:
                machine.process.kill()
                machine.process.wait()
        self._machines.clear()
