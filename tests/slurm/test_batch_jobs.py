"""The batch scripts as they are shipped, on a real SLURM of two nodes: trained, told to stop, cut off, come back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.studies.search.records import load_results
from tests.helpers.distilling import make_teacher
from tests.helpers.launching import ROOT, TINY, Runs, environment, losses
from tests.slurm.slurm import ENDED, MISSING, SlurmCluster

pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(600)]

TRAIN = ROOT / "launch/slurm/train.sbatch"
EPOCHS = ["--train.epochs", "6"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


class Jobs:
    """Submits the scripts as a user does, from the root of the checkout."""

    def __init__(self, cluster: SlurmCluster, runs: Runs) -> None:
        self.cluster, self.runs = cluster, runs

    def train(self, output: Path, *overrides: str, nodes: str = "2", options: tuple[str, ...] = ()) -> str:
        argv = self.runs.train_argv(output, "--train.keep-checkpoints", "2", *overrides)[1:]
        return self.submit(TRAIN, argv, output.name, nodes=nodes, options=options)

    def submit(
        self, script: Path, argv: list[str], name: str, *, nodes: str = "2", options: tuple[str, ...] = ()
    ) -> str:
        for node in self.cluster.nodes:  # what the last job left must have ended
            self.cluster.wait_node(node, "idle")
        env = {"FPCN_RANKS_PER_NODE": "2", "FPCN_HOOK": str(self.hook()), "OMP_NUM_THREADS": "1"}
        out = f"--output={self.cluster.folder}/{name}.out"
        return self.cluster.submit(script, *argv, options=[f"--nodes={nodes}", out, *options], env=env, cwd=ROOT)

    def hook(self) -> Path:
        """What a cluster's users write: here, where python is, and which interface joins the nodes."""
        path = self.runs.folder / "hook.sh"
        bin_dir = environment()["PATH"].partition(":")[0]
        path.write_text(f"export PATH={bin_dir}:$PATH GLOO_SOCKET_IFNAME=eth0\n")
        return path

    def finish(self, job: str, timeout: float = 240) -> dict[str, str]:
        fields = self.cluster.wait(job, timeout=timeout)
        assert fields["JobState"] == "COMPLETED", self.cluster.output(job)
        return fields

    def until(self, job: str, condition: Callable[[], object], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.cluster.job(job)["JobState"] not in ENDED, self.cluster.output(job)
            assert time.monotonic() < deadline, self.cluster.output(job)[-6000:]
            time.sleep(0.05)


@pytest.fixture(scope="module")
def jobs(cluster, runs) -> Jobs:
    return Jobs(cluster, runs)


def steps(run: Path) -> int:
    return len([line for line in read_metrics(run) if line["kind"] == "step"])


@pytest.fixture(scope="module")
def undisturbed(jobs) -> Path:
    """Two nodes with two ranks each, to the end."""
    output = jobs.runs.folder / "slurm-undisturbed"
    jobs.finish(jobs.train(output, *EPOCHS))
    return output


def same(run: Path, undisturbed: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, undisturbed))
    return losses(run) == losses(undisturbed) and all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_job_trains_over_its_nodes(jobs, undisturbed):
    shown = (jobs.cluster.folder / "slurm-undisturbed.out").read_text()
    assert "2 node(s) x 2 rank(s), meeting at node1:" in shown and "test accuracy" in shown
    # torchrun itself complains where the agent of another node has left first, as this one no longer needs it to.
    ours = [line for line in shown.splitlines() if "elastic/agent/server/api.py" not in line]
    assert "Traceback" not in "\n".join(ours) and "ended with status 0" in shown
    assert len(losses(undisturbed)) == 18
    assert (undisturbed / "report.html").is_file()


def srun(jobs: Jobs, tasks: int, *argv: str) -> str:
    """What a script prints that srun starts itself, on two nodes, without any program of SLURM, as in a container."""
    python = environment()["PATH"].partition(":")[0] + "/python"
    command = ["srun", "--nodes=2", f"--ntasks-per-node={tasks}", "--export=ALL,PATH=/nowhere", python, *argv]
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    return jobs.cluster.run(*command, cwd=ROOT, env=env, timeout=200).stdout


def test_srun_starts_ranks_without_a_script(jobs, undisturbed):
    output = jobs.runs.folder / "slurm-srun"
    assert "test accuracy" in srun(jobs, 2, *jobs.runs.train_argv(output, *EPOCHS))
    assert same(output, undisturbed)


def test_the_doctor_looks_at_all_nodes(jobs):
    shown = srun(jobs, 1, "launch/doctor.py", "--data", str(jobs.runs.data))
    assert "0 problem(s)" in shown and {"node1: ok", "node2: ok"} <= set(
        re.findall(r"^node\d: ok", shown, re.MULTILINE)
    )
    assert "rendezvous: 2 ranks on 2 node(s) sum right by gloo" in shown


def test_told_to_stop_it_comes_back_as_the_same_job(jobs, undisturbed):
    output = jobs.runs.folder / "slurm-warned"
    job = jobs.train(output, *EPOCHS, "--train.log-every", "100", "--train.checkpoint-every", "100")
    jobs.until(job, lambda: steps(output) >= 3)
    jobs.cluster.signal(job, "USR1", batch=True)
    jobs.until(job, lambda: jobs.cluster.job(job)["Restarts"] == "1")
    reached = steps(output)
    assert 3 <= reached < 18 and (output / f"checkpoints/step-{reached:08d}.safetensors").is_file()
    fields = jobs.finish(job)
    assert fields["JobId"] == job and fields["Restarts"] == "1"
    shown = jobs.cluster.output(job)
    assert "queued again" in shown and f"resuming from step {reached}" in shown
    assert same(output, undisturbed)


def test_the_time_limit_warns_before_it_ends_a_job(jobs, undisturbed):
    output = jobs.runs.folder / "slurm-limit"
    # The warning comes up to a minute before it is asked for; a minute is the shortest limit.
    job = jobs.train(output, "--train.epochs", "2000", options=("--time=1", "--signal=B:USR1@50"))
    jobs.until(job, lambda: jobs.cluster.job(job)["Restarts"] == "1")
    # Where a machine is slow, the warning finds the job at its start, which it leaves with nothing to keep.
    jobs.until(job, lambda: steps(output) >= 1 or jobs.cluster.job(job)["Restarts"] == "3", timeout=240)
    assert steps(output) >= 1 and list((output / "checkpoints").glob("step-*"))
    jobs.cluster.cancel(job)
    jobs.cluster.wait(job)


def test_a_node_without_power_is_done_without(jobs, undisturbed):
    output = jobs.runs.folder / "slurm-lost-node"
    job = jobs.train(output, *EPOCHS, nodes="1-2")
    jobs.until(job, lambda: steps(output) >= 4)
    jobs.cluster.kill_node(2)
    try:
        fields = jobs.finish(job)
        shown = jobs.cluster.output(job)
        assert int(fields["Restarts"]) >= 1 and fields["NodeList"] == "node1", shown
        assert "2 rank(s) where there were 4: each cuts its share of a batch into 2 parts" in shown
        assert losses(output) == pytest.approx(losses(undisturbed), rel=1e-4)
    finally:
        jobs.cluster.start_node(2)
        jobs.cluster.wait_node(2, "idle")


def test_a_search_over_the_nodes_of_a_job_is_told_to_stop_and_comes_back(jobs):
    output = jobs.runs.folder / "slurm-search"
    argv = ["--recipe", str(jobs.runs.recipe), "--data", str(jobs.runs.data), "--stage", "teacher", "--trials", "2"]
    argv += ["--scheduler", "none", "--workers-per-trial", "2", "--train.epochs", "8", "--output", str(output)]
    job = jobs.submit(ROOT / "launch/slurm/tune.sbatch", argv, output.name)
    jobs.until(job, lambda: list(output.glob("trials/*/checkpoints/step-*8.safetensors")))
    jobs.cluster.signal(job, "USR1", batch=True)
    assert jobs.finish(job)["Restarts"] == "1"
    results = load_results(output)
    assert results is not None and [trial.state for trial in results.trials] == ["finished"] * 2
    assert "resuming from step" in "".join(path.read_text() for path in (output / "logs").glob("trial-*"))
    hosts = {
        host for log in (output / "logs").glob("trial-*") for host in re.findall(r"on (\w+), Ray", log.read_text())
    }
    assert hosts == {"node1", "node2"}
    shown = jobs.cluster.output(job)
    assert "Ray on 2 node(s)" in shown and "best recipe" in shown and "Traceback" not in shown


def test_a_distillation_over_the_nodes_of_a_job_and_its_exit_status(jobs, tmp_path):
    teacher, recipe, output = make_teacher(tmp_path / "teacher"), tmp_path / "student.yaml", tmp_path / "students"
    values = yaml.safe_load(TINY) | {"task": "distill", "name": "students"}
    values["data"]["views"] = 2
    recipe.write_text(yaml.safe_dump(values))
    argv = ["--recipe", str(recipe), "--data", str(jobs.runs.data), "--teacher", str(teacher), "--output", str(output)]
    script = ROOT / "launch/slurm/distill.sbatch"
    job = jobs.submit(script, [*argv, "--students", "test_resnet,mobilenet_v2"], "slurm-distill")
    jobs.finish(job)
    assert (output / "distillation.json").is_file()
    assert all(RunFolder(output / name).read_outcome()[0] == "finished" for name in ("test_resnet", "mobilenet_v2"))
    wrong = jobs.submit(script, [*argv, "--students", "resnet19"], "slurm-distill-wrong", nodes="1")
    fields = jobs.cluster.wait(wrong, timeout=120)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0")
    assert "did you mean" in jobs.cluster.output(wrong)


def test_a_reproduction_over_the_nodes_of_a_job(jobs, tmp_path):
    output, argv = tmp_path / "tables", ["--data", str(jobs.runs.data), "--only", "figure5"]
    small = {
        "data.resize": 40,
        "data.crop": 32,
        "data.images-per-class": 4,
        "data.threads": 2,
        "train.epochs": 1,
        "train.eval-every": 1,
        "model.norm": "frozen_batch",
        "model.backbone": "test_resnet",
    }
    argv += ["--output", str(output), *(word for name, value in small.items() for word in (f"--{name}", str(value)))]
    jobs.finish(jobs.submit(ROOT / "launch/slurm/reproduce.sbatch", argv, "slurm-reproduce"))
    assert (output / "report.html").is_file() and (output / "figure5").is_dir()
    logs = [log.read_text() for log in (output / "runs/logs").glob("*-seed0-rank0.log")]
    nodes = {re.findall(r"Ray node (\w+)", log)[-1] for log in logs}
    assert len(logs) == len(nodes) == 2, "each node has trained one of the two networks"
