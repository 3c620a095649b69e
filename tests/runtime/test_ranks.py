"""What a process learns about itself from its launcher's environment."""

from __future__ import annotations

import pytest

from fpcn_dist.runtime import ranks


def start_with_srun(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Let this process look like a task of a SLURM job step."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_NODEID"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone, too
        monkeypatch.delenv(name)
    for name, value in {"MASTER_ADDR": "localhost", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0", **variables}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("written", "tasks"),
    [("4", [4]), ("2(x3)", [2, 2, 2]), ("4(x2),2", [4, 4, 2]), ("1,3(x2),1", [1, 3, 3, 1]), ("8(x12)", [8] * 12)],
)
def test_the_tasks_of_every_node_are_read(written, tasks):
    assert ranks._tasks_per_node(written) == tasks


@pytest.mark.parametrize("node_is_told", [True, False])
@pytest.mark.parametrize(("rank", "node", "local_world_size"), [(0, 0, 4), (4, 1, 4), (7, 1, 4), (8, 2, 2), (9, 2, 2)])
def test_the_local_world_size_is_that_of_the_own_node(monkeypatch, rank, node, local_world_size, node_is_told):
    start_with_srun(monkeypatch, SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS="10", SLURM_STEP_TASKS_PER_NODE="4(x2),2")
    if node_is_told:
        monkeypatch.setenv("SLURM_NODEID", str(node))
    assert ranks._environment() == (rank, 10, 0, local_world_size)
    assert ranks.os.environ["LOCAL_WORLD_SIZE"] == str(local_world_size)


def test_the_node_that_is_told_counts_where_tasks_are_dealt_out_in_turn(monkeypatch):
    start_with_srun(monkeypatch, SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="6", SLURM_STEP_TASKS_PER_NODE="4,2")
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert ranks._environment()[3] == 2
