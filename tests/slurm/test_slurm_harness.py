"""The throw-away SLURM does what a real one does, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT
from tests.slurm.slurm import MISSING, SlurmCluster

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


def script(folder: Path, *lines: str) -> Path:
    path = folder / "job.sbatch"
    path.write_text("\n".join(["#!/bin/bash", *lines]))
    return path


def connects(cluster: SlurmCluster, node: int, other: int) -> bool:
    """Whether a node reaches the SLURM daemon of another."""
    connect = ["timeout", "2", "bash", "-c", f": < /dev/tcp/node{other}/6818"]
    return cluster.run(*connect, node=node, check=False).returncode == 0


def test_a_job_over_two_nodes(cluster, tmp_path):
    job = script(
        tmp_path,
        "#SBATCH --nodes=2 --ntasks-per-node=1",
        'srun bash -c \'mkdir /tmp/own /dev/shm/own && echo "$(hostname) says $1 $GREETING"\' bash "$1"',
    )
    job = cluster.submit(job, "good day", env={"GREETING": "to you"})
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
    assert sorted(cluster.output(job).splitlines()) == [f"node{n} says good day to you" for n in (1, 2)]
    assert cluster.job(job)["NodeList"] == "node[1-2]" and cluster.job(job)["ExitCode"] == "0:0"


def test_a_job_that_fails_and_one_that_is_cancelled(cluster, tmp_path):
    failing = cluster.submit(script(tmp_path, "exit 7"))
    fields = cluster.wait(failing)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "7:0")
    endless = cluster.submit(script(tmp_path, "sleep 600"), options=["--job-name=endless"])
    assert cluster.wait(endless, ["RUNNING"])["JobName"] == "endless"
    with pytest.raises(TimeoutError, match="RUNNING"):
        cluster.wait(endless, timeout=0)
    cluster.cancel(endless)
    assert cluster.wait(endless)["JobState"] == "CANCELLED"
    with pytest.raises(RuntimeError, match="Invalid job id"):
        cluster.job("999")


def test_a_requeued_job_keeps_its_id(cluster, tmp_path):
    """As preemption does it: a signal to the script, which puts its own job back into the queue."""
    job = cluster.submit(
        script(
            tmp_path,
            "trap 'scontrol requeue $SLURM_JOB_ID' USR1",
            'echo "start ${SLURM_RESTART_COUNT:-0} of $SLURM_JOB_ID"',
            '[ -n "$SLURM_RESTART_COUNT" ] && exit 0',
            "sleep 600 & wait; wait",
        ),
        options=["--open-mode=append"],
    )
    cluster.wait(job, ["RUNNING"])
    while "start 0" not in cluster.output(job):
        time.sleep(0.05)
    cluster.signal(job, "USR1", batch=True)
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    lines = [line for line in cluster.output(job).splitlines() if line.startswith("start")]
    assert lines == [f"start 0 of {job}", f"start 1 of {job}"]
    assert cluster.job(job)["Restarts"] == "1"


def test_a_network_that_is_cut_and_mended(cluster):
    assert connects(cluster, 1, 2) and connects(cluster, 2, 1)
    cluster.cut_network(2)
    assert not connects(cluster, 1, 2) and not connects(cluster, 2, 1)
    assert connects(cluster, 2, 2)
    cluster.mend_network(2)
    assert connects(cluster, 1, 2) and connects(cluster, 2, 1)


def test_a_node_without_power_comes_back(cluster, tmp_path):
    job = cluster.submit(
        script(tmp_path, 'hostname; [ -n "$SLURM_RESTART_COUNT" ] || sleep 600'), options=["--nodelist=node2"]
    )
    cluster.wait(job, ["RUNNING"])
    cluster.kill_node(2)
    assert not connects(cluster, 1, 2)
    cluster.wait_node(2, "down", timeout=30)
    cluster.start_node(2)
    cluster.wait_node(2, "idle", timeout=10)
    assert connects(cluster, 1, 2)
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1" and "node2" in cluster.output(job)


def processes(folder: Path) -> list[str]:
    """Command lines of all processes that know of a folder from their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(folder) in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            pass  # it has ended since
    return found


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), SlurmCluster(tmp_path / "cluster") as cluster:
        cluster.submit(script(tmp_path, "setsid sleep 600 & wait"))
        assert any("slurmctld" in line for line in processes(cluster.folder))
        raise ZeroDivisionError
    assert processes(tmp_path / "cluster") == []


def test_nothing_is_left_of_a_test_that_is_killed(tmp_path):
    program = (
        "from pathlib import Path\nfrom tests.slurm.slurm import SlurmCluster\n"
        f"with SlurmCluster(Path({str(tmp_path / 'cluster')!r})):\n    print('up', flush=True)\n    input()\n"
    )
    test = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert test.stdin and test.stdout
    with test.stdin, test.stdout:
        assert test.stdout.readline() == "up\n"
        assert processes(tmp_path / "cluster")
        test.send_signal(signal.SIGKILL)
        test.wait()
    for _ in range(100):
        if not processes(tmp_path / "cluster"):
            break
        time.sleep(0.05)
    assert processes(tmp_path / "cluster") == []
