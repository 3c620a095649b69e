"""Which process among all this one is, as its launcher's environment says. Imports no torch.

=========================  =====================================================================================
torchrun, deepspeed        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
mpirun of Open MPI         OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE
mpirun of MPICH, Intel     PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
srun                       SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE
=========================  =====================================================================================

The first that is there counts: what mpirun starts inside a batch job has SLURM's variables, too. An empty variable is
none. The other launchers' variables are turned into those of torchrun, which PyTorch reads.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from fpcn_dist.runtime.errors import UserError

_PORTS = range(20000, 40000)
_SIBLINGS_WITHIN = 10.0
"""Seconds in which the other tasks of a job step on this machine must be seen; srun starts them all at once."""
_SHELLS = frozenset({"bash", "sh", "dash", "zsh", "fish", "tcsh", "csh", "ksh"})
_SCRIPT = re.compile(r"[^-]|-\w*c")
"""A shell's argument that gives it something to do: a file's name, or -c."""


class Placement(NamedTuple):
    """This process among all processes of the run, and among those of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


ALONE = Placement(0, 1, 0, 1)


def told(name: str, default: int) -> int:
    """A whole number that the launcher has set; the default where it is missing, empty or something else.

    For what must not fail, as messages: :func:`placement` refuses what is no number.
    """
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def placement(*, join: bool = True) -> Placement:
    """Read the environment, and complete it with the variables of torchrun; no launcher means :data:`ALONE`.

    Args:
        join: whether to meet the other processes that srun or mpirun started. If not, the first one is alone, and the
            others leave. torchrun and deepspeed exist to let processes meet: what they start always does.

    Raises:
        SystemExit: with status 0; this is not the first of the processes, and they shall not meet.
        UserError: a variable is no number or contradicts another one, the address of the first rank is not known, or
            the other tasks of the job step have ended.
    """
    env = {name: value for name, value in os.environ.items() if value}
    if "RANK" in env and "WORLD_SIZE" in env:
        world_size = _number(env, "WORLD_SIZE")
        local = _number(env, "LOCAL_RANK", 0), _number(env, "LOCAL_WORLD_SIZE", world_size)
        return _checked(Placement(_number(env, "RANK"), world_size, *local), "RANK")
    if not join:
        first = next((env[name] for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID") if name in env), "0")
        if first != "0":
            raise SystemExit(0)
        return ALONE
    found = _of_mpi(env) or _of_srun(env)
    if found is None:
        if "PMIX_RANK" in env and "SLURM_PROCID" not in env:
            hint = (
                "start the processes with torchrun, or give each of them RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR"
            )
            raise UserError(
                "PMIX_RANK", env["PMIX_RANK"], "the launcher does not tell how many processes it starts", hint
            )
        return ALONE
    if found.world_size > 1:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        os.environ.update(zip(names, map(str, found), strict=True))
    return found


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        reason = "is not set, where other variables of the launcher are" if name not in env else "is no whole number"
        hint = "start the processes with torchrun, srun or mpirun, or unset the variables that another tool has left"
        raise UserError(name, env.get(name), reason, hint) from None


def _checked(found: Placement, name: str) -> Placement:
    if not (0 <= found.rank < found.world_size and 0 <= found.local_rank < found.local_world_size <= found.world_size):
        reason = (
            f"rank {found.rank} of {found.world_size}, and {found.local_rank} of {found.local_world_size} on its "
            "machine, contradict each other"
        )
        hint = "number the ranks of the run, and those of each machine, from 0; or unset what another tool has left"
        raise UserError(name, found.rank, reason, hint)
    return found


def _of_mpi(env: Mapping[str, str]) -> Placement | None:
    """As Open MPI's, MPICH's or Intel's mpirun has it; ``None`` where none of them started this process."""
    if "OMPI_COMM_WORLD_SIZE" in env:
        names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    elif "PMI_SIZE" in env and ("MPI_LOCALRANKID" in env or "SLURM_PROCID" not in env):
        names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    else:
        return None
    world_size = _number(env, names[1])
    if world_size == 1:
        return ALONE
    # Where the machine's own count is missing, there is one machine: MPICH before 4 tells nothing else.
    rank = _number(env, names[0])
    found = Placement(rank, world_size, _number(env, names[2], rank), _number(env, names[3], world_size))
    if "MASTER_ADDR" not in env:
        if found.local_world_size < world_size:
            hint = "mpirun -x MASTER_ADDR=HOST (Open MPI), or -genv MASTER_ADDR HOST, with the first rank's machine"
            raise UserError("MASTER_ADDR", None, "mpirun does not tell on which machine the first rank runs", hint)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    # The same for all ranks of a command: its job's name where there is one, else its process, the parent of all.
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or env.get("SLURM_JOB_ID")
    os.environ.setdefault("MASTER_PORT", str(_port(job or str(os.getppid()))))
    return _checked(found, names[0])


def _of_srun(env: Mapping[str, str]) -> Placement | None:
    """As srun has it; ``None`` where this process is no task, or the only one, of a job step."""
    if "SLURM_PROCID" not in env or _number(env, "SLURM_STEP_NUM_TASKS", 1) == 1:
        return None
    rank, world_size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
    if in_interactive_shell(env):
        print(f"this shell is one of the {world_size} tasks that srun started: one process works here", flush=True)
        return None
    tasks = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    local_world_size = tasks[_number(env, "SLURM_NODEID", _node_of(rank, tasks))]
    if rank == 0 and local_world_size > 1 and not _has_siblings(env):
        reason = "of the tasks that srun started on this machine, no other one is alive"
        hint = "in a shell of 'srun --pty', unset SLURM_STEP_NUM_TASKS, or ask for one with 'srun --ntasks=1 --pty'"
        raise UserError("SLURM_STEP_NUM_TASKS", world_size, reason, hint)
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
        if nodes is None:
            raise UserError("SLURM_STEP_NODELIST", None, "is not set", "set MASTER_ADDR to the job's first machine")
        os.environ["MASTER_ADDR"] = first_node(nodes)
    if "MASTER_PORT" not in env:
        job = env.get("SLURM_JOB_ID", "0")
        os.environ["MASTER_PORT"] = str(_PORTS.start + int(job) % len(_PORTS) if job.isdigit() else _port(job))
    return _checked(Placement(rank, world_size, _number(env, "SLURM_LOCALID"), local_world_size), "SLURM_PROCID")


def _port(job: str) -> int:
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]


def first_node(nodes: str) -> str:
    """The first machine of SLURM's short form: "gpu[003-007,9],login1" means gpu003.

    It is the only one that is asked for, so neither scontrol, which containers lack, nor a library is needed.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None, "matches the empty string, too"
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def _tasks_per_node(written: str) -> list[int]:
    """The number of tasks of each node, from SLURM's short form: "4(x2),2" means [4, 4, 2]."""
    tasks = []
    for part in written.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks


def _node_of(rank: int, tasks: list[int]) -> int:
    """The number of the node that runs task ``rank``, where SLURM fills one node after the other."""
    return next(node for node, end in enumerate(itertools.accumulate(tasks)) if rank < end)


def in_interactive_shell(env: Mapping[str, str]) -> bool:
    """Whether the task of SLURM that this process belongs to is a shell at a terminal, as of ``srun --pty bash``."""
    if not sys.stdin or not sys.stdin.isatty() or not env.get("SLURM_TASK_PID", "").isdigit():
        return False
    import psutil  # only here and below: the doctor reads this environment, too, and tells which package is missing

    try:
        name, *words = psutil.Process(int(env["SLURM_TASK_PID"])).cmdline() or [""]
    except psutil.Error:
        return False
    return os.path.basename(name).lstrip("-") in _SHELLS and not any(map(_SCRIPT.match, words))


def _has_siblings(env: Mapping[str, str]) -> bool:
    """Whether another task of the job step lives on this machine; waits a while for one.

    Where processes of the task are not seen under the numbers that SLURM gives them, as in a container with numbers of
    its own, nothing can be told, and the answer is yes.
    """
    import psutil

    task = env.get("SLURM_TASK_PID", "")
    if task and task not in map(str, [os.getpid(), *(parent.pid for parent in psutil.Process().parents())]):
        return True
    until = time.monotonic() + _SIBLINGS_WITHIN
    while not any(_is_sibling(process.info["environ"], env) for process in psutil.process_iter(["environ"])):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _is_sibling(theirs: Mapping[str, str] | None, env: Mapping[str, str]) -> bool:
    """Whether the environment of a process, ``None`` where it cannot be read, is that of another task of the step."""
    if theirs is None or any(theirs.get(name) != env.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")):
        return False
    return theirs.get("SLURM_PROCID", env["SLURM_PROCID"]) != env["SLURM_PROCID"]
