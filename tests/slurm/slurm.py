"""A throw-away SLURM cluster on this one machine, for tests of what `sbatch` and `srun` start."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.slurm.machines import CONTROLLER_ADDRESS, Machines, missing

MISSING = missing("slurmctld", "slurmd", "sbatch", "srun", "munged")
"""Why there can be no such cluster here, or ``None`` where there can."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
"""States that a job does not leave by itself."""

_CONTROLLER = r"""
mkdir -m 755 /run/munge
(umask 077; head -c 128 /dev/urandom > /run/munge/key)
munged --key-file=/run/munge/key --pid-file=/run/munge/pid --seed-file=/run/munge/seed --log-file=/run/munge/log \
    --socket=/run/munge/socket
slurmctld -D -c >&2 &
"""
_NODE = 'slurmd -D -N "$(hostname)" &'

# MessageTimeout bounds how long the controller waits for a node that says nothing, SlurmdTimeout when it gives it up.
# KillWait is below MessageTimeout, or an order to end a step is sent again, and ends that of the requeued job.
# A requeued job starts when the credential of its first start has expired, by default after two minutes.
_CONFIG = """
ClusterName=throwaway
SlurmctldHost=controller({controller})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=/run/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout=8
MessageTimeout=5
KillWait=2
NodeName=node[1-{nodes}] CPUs={cpus} RealMemory={memory}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster(Machines):
    """Nodes ``node1``, ``node2``, ... with SLURM, idle when the ``with`` block begins.

    Args:
        folder: empty, or not there yet; holds configuration, logs and, unless a job says otherwise, its output.
        nodes: how many.
        cpus: CPU cores that each node says it has.

    Raises:
        RuntimeError: from any method: a command failed; the message has what it printed.
        TimeoutError: from those that wait.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 2) -> None:
        config = folder.absolute() / "slurm.conf"
        super().__init__(folder, nodes, (_CONTROLLER, _NODE), {"SLURM_CONF": str(config)})
        (self.folder / "state").mkdir()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        values = {"controller": CONTROLLER_ADDRESS, "nodes": nodes, "cpus": cpus, "memory": memory}
        config.write_text(_CONFIG.format(folder=self.folder, **values))

    def wait_until_up(self) -> None:
        for node in self.nodes:
            self.wait_node(node, "idle")

    def submit(
        self,
        script: Path,
        *args: str,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Queue a batch script with its arguments, under further options of ``sbatch``; gives the job's id."""
        return self.run("sbatch", "--parsable", *options, str(script), *args, env=env, cwd=cwd).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        line = self.run("scontrol", "show", "job", job, "--oneliner").stdout
        return dict(re.findall(r"([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|\s*$)", line))

    def output(self, job: str) -> str:
        """What the job has printed so far."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text(errors="replace") if file.exists() else ""

    def wait(self, job: str, states: Sequence[str] = ENDED, timeout: float = 60) -> dict[str, str]:
        """Wait until the job is in one of the states; gives its fields then."""
        deadline = time.monotonic() + timeout
        while (fields := self.job(job))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{fields} after {timeout:g} s; its output:\n{self.output(job)[-4000:]}")
            time.sleep(0.1)
        return fields

    def cancel(self, job: str) -> None:
        """End the job, waiting or running."""
        self.run("scancel", job)

    def signal(self, job: str, name: str, *, batch: bool = False) -> None:
        """Send ``USR1`` and the like to the job's steps, or with ``batch`` to its script alone."""
        self.run("scancel", f"--signal={name}", *(["--batch"] if batch else []), job)

    def node_state(self, node: int) -> str:
        """``idle``, ``allocated``, ``down``, ...; empty where the controller does not answer yet."""
        shown = self.run("sinfo", "--noheader", f"--nodes=node{node}", "--format=%T", check=False).stdout
        return shown.strip().rstrip("*")  # the star of a node that does not answer

    def wait_node(self, node: int, state: str, timeout: float = 60) -> None:
        """Wait until the node is in a state: after :meth:`kill_node` ``down``, after :meth:`start_node` ``idle``."""
        deadline = time.monotonic() + timeout
        while (found := self.node_state(node)) != state:
            if time.monotonic() > deadline:
                raise TimeoutError(f"node{node} is {found!r}, not {state}, after {timeout:g} s\n{self.log()}")
            time.sleep(0.1)
