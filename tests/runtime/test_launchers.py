"""What a process learns about itself from its launcher's environment."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fpcn_dist.runtime import launchers
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.launchers import ALONE, Placement, placement

_ROOT = Path(__file__).parents[2]
_SRUN = {"SLURM_JOB_ID": "7", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[003-004],login1"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without a trace of a launcher, and what the code writes into it undone."""
    written = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_")
    for name in (*written, *(name for name in os.environ if name.startswith(prefixes))):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone, too
        monkeypatch.delenv(name)


@pytest.fixture
def in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_has_siblings", lambda env: True)


def start(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def exported() -> tuple[str | None, ...]:
    """What PyTorch reads."""
    return tuple(map(os.environ.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")))


@pytest.mark.parametrize(
    ("written", "tasks"),
    [("4", [4]), ("2(x3)", [2, 2, 2]), ("4(x2),2", [4, 4, 2]), ("1,3(x2),1", [1, 3, 3, 1]), ("8(x12)", [8] * 12)],
)
def test_the_tasks_of_every_node_are_read(written: str, tasks: list[int]) -> None:
    assert launchers._tasks_per_node(written) == tasks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("node1,node2", "node1"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("gpu[9,003-007]", "gpu9"),
        ("rack[1-2]n[08-11].cluster", "rack1n08.cluster"),
        ("a-b-[10-12]-ib", "a-b-10-ib"),
    ],
)
def test_the_first_node_is_read(nodes: str, first: str) -> None:
    assert launchers.first_node(nodes) == first


@pytest.mark.usefixtures("in_company")
@pytest.mark.parametrize("node_is_told", [True, False])
@pytest.mark.parametrize(("rank", "node", "local_world_size"), [(0, 0, 4), (4, 1, 4), (7, 1, 4), (8, 2, 2), (9, 2, 2)])
def test_srun_without_any_program_of_slurm(
    monkeypatch: pytest.MonkeyPatch, rank: int, node: int, local_world_size: int, node_is_told: bool
) -> None:
    tasks = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2"}
    start(monkeypatch, PATH="/nowhere", **_SRUN, **tasks, **({"SLURM_NODEID": str(node)} if node_is_told else {}))
    assert placement() == (rank, 10, 0, local_world_size)
    assert exported() == (str(rank), "10", "0", str(local_world_size), "gpu003")
    assert os.environ["MASTER_PORT"] == "20007"


def test_the_node_that_is_told_counts_where_tasks_are_dealt_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "4,2"}
    start(monkeypatch, **_SRUN, **tasks, SLURM_NODEID="1")
    assert placement().local_world_size == 2


@pytest.mark.parametrize("variables", [{}, {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": "4"}, {"SLURM_NTASKS": "4"}])
def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    start(monkeypatch, **variables)
    assert placement() == ALONE and os.environ.get("RANK", "") == ""


_OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
_MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    "variables",
    [
        {**_OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        _OPEN_MPI,
        _MPICH,
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        # mpirun in a batch job: the variables of the one task that holds its daemon are there, too
        {**_OPEN_MPI, **_SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {**_MPICH, **_SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3"},
    ],
)
def test_mpirun_on_one_machine(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    start(monkeypatch, **variables)
    assert placement() == Placement(1, 2, 1, 2)
    assert exported() == ("1", "2", "1", "2", "127.0.0.1")
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000


@pytest.mark.usefixtures("in_company")
def test_srun_with_pmi_is_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    start(monkeypatch, **_SRUN | {"SLURM_LOCALID": "1"}, **tasks, PMI_RANK="1", PMI_SIZE="4")
    assert placement() == Placement(1, 4, 1, 2)


def test_mpirun_over_machines_meets_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {**_OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    start(monkeypatch, **variables)
    with pytest.raises(UserError) as error:
        placement()
    assert str(error.value) == (
        "MASTER_ADDR: mpirun does not tell on which machine the first rank runs; "
        "mpirun -x MASTER_ADDR=HOST (Open MPI), or -genv MASTER_ADDR HOST, with the first rank's machine"
    )
    start(monkeypatch, MASTER_ADDR="head")
    assert placement() == Placement(1, 2, 0, 1) and os.environ["MASTER_ADDR"] == "head"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "many"}, "WORLD_SIZE many: is no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2: rank 2 of 2, and 0 of 2 on its machine, contradict each other"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3"}, "RANK 0: rank 0 of 2, and 3 of 2 on its machine"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK 1: the launcher does not tell how many processes it starts"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK: is not set, where other variables of the launcher are"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NODELIST: is not set; set MASTER_ADDR"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    start(monkeypatch, **variables)
    with pytest.raises(UserError) as error:
        placement()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("value", "number"), [("3", 3), ("", 7), (None, 7), ("x", 7), ("-1", 7)])
def test_what_is_told_or_else_the_default(monkeypatch: pytest.MonkeyPatch, value: str | None, number: int) -> None:
    if value is not None:
        monkeypatch.setenv("RANK", value)
    assert launchers.told("RANK", 7) == number


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("name", ["SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_who_does_not_join_is_alone_or_leaves(monkeypatch: pytest.MonkeyPatch, name: str, rank: str) -> None:
    start(monkeypatch, **{name: rank, "SLURM_STEP_NUM_TASKS": "2"})
    if rank == "0":
        assert placement(join=False) == ALONE
        return
    with pytest.raises(SystemExit) as leaving:
        placement(join=False)
    assert leaving.value.code == 0


_STEP = {**_SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}


@pytest.fixture
def sibling() -> Iterator[subprocess.Popen]:
    """The other task of the step."""
    with subprocess.Popen(["sleep", "60"], env={**os.environ, **_STEP, "SLURM_PROCID": "1"}) as process:
        yield process
        process.kill()


def test_tasks_whose_peers_are_alive_meet(monkeypatch: pytest.MonkeyPatch, sibling: subprocess.Popen) -> None:
    start(monkeypatch, **_STEP)
    assert sibling.poll() is None and placement() == Placement(0, 2, 0, 2)


@pytest.mark.parametrize(("task", "refused"), [("", True), (str(os.getppid()), True), ("1000000000", False)])
def test_a_task_whose_peers_have_ended_does_not_wait_for_them(
    monkeypatch: pytest.MonkeyPatch, task: str, refused: bool
) -> None:
    """Only where it would see them: in a container, processes may have numbers of their own."""
    monkeypatch.setattr(launchers, "_SIBLINGS_WITHIN", 0.0)
    start(monkeypatch, **_STEP, SLURM_TASK_PID=task)
    if not refused:
        assert placement() == Placement(0, 2, 0, 2)
        return
    with pytest.raises(UserError) as error:
        placement()
    assert str(error.value) == (
        "SLURM_STEP_NUM_TASKS 2: of the tasks that srun started on this machine, no other one is alive; in a shell of "
        "'srun --pty', unset SLURM_STEP_NUM_TASKS, or ask for one with 'srun --ntasks=1 --pty'"
    )


@pytest.mark.parametrize(("argv", "alone"), [(["bash", "--norc", "-i"], True), (["bash", "-c", "{}; true"], False)])
def test_the_shell_of_a_job_step_is_one_process(argv: list[str], alone: bool) -> None:
    """A shell at a terminal is; a shell that srun started to do something is a task like others."""
    ask = f"{sys.executable} -c 'from fpcn_dist.runtime import launchers as l; import os"
    ask += '; print("alone", l.in_interactive_shell(os.environ))\''
    ask = f"SLURM_TASK_PID=$$ {ask}"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [word.format(ask) for word in argv]
    with (
        os.fdopen(ours, "wb") as keyboard,
        subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as shell,
    ):
        os.close(theirs)
        keyboard.write(f"{ask}\nexit\n".encode())
        keyboard.flush()
        shown = shell.communicate(timeout=60)[0].decode()
    assert f"alone {alone}" in shown
