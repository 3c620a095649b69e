"""The doctor finds what is wrong, says how to mend it, and is content with a machine that trains."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import fpcn_kernels
import pytest
import torch

from fpcn_dist.doctor import computing, machine, network, software
from fpcn_dist.doctor.examination import examine
from fpcn_dist.doctor.findings import Check, Finding, ok, stuck
from tests.helpers.launching import ROOT, command, environment, free_port
from tests.slurm.slurm import MISSING, SlurmCluster

CPU = torch.device("cpu")
DOCTOR = str(ROOT / "launch/doctor.py")
CHECKS = (
    "python",
    "packages",
    "gpu",
    "processor",
    "memory",
    "disk",
    "host name",
    "network",
    "decoding",
    "masked_pool",
    "pair_contrast",
)


def doctor(folder: Path, *args: str, launcher: str = "python", expect: int, env: dict[str, str] | None = None) -> str:
    """What the command prints."""
    argv = [*command(launcher), DOCTOR, *args]
    done = subprocess.run(
        argv, cwd=folder, env=environment() | (env or {}), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert launcher == "torchrun" or done.stderr == ""
    return done.stdout


def lines(output: str, status: str, check: str) -> list[str]:
    return [line for line in output.splitlines() if f"{status:<8}{check}: " in line]


@pytest.fixture
def data(rocks: Path, tmp_path: Path) -> Path:
    """A data folder with one JPEG that is cut short."""
    shutil.copytree(rocks, tmp_path / "data")
    whole = next((tmp_path / "data/marble").glob("0*.jpg"))
    (tmp_path / "data/marble/short.jpg").write_bytes(whole.read_bytes()[:-200])
    return tmp_path / "data"


@pytest.mark.slow
def test_a_machine_that_trains(data, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    output = doctor(here, "--data", str(data), expect=0)
    for check in (*CHECKS, "port", "data"):
        assert lines(output, "ok", check) or lines(output, "warning", check), output
    assert f"disk: {here} writes" in output
    assert "72 images of 3 classes" in output and "(24)" in output
    (refused,) = lines(output, "warning", "data")
    assert "1 image(s) cannot be used" in refused and "marble/short.jpg" in refused
    assert "0 problem(s)" in output.splitlines()[-1]
    assert list(here.iterdir()) == []
    if not torch.cuda.is_available():
        assert "masked_pool: PyTorch on cpu agrees" in output


@pytest.mark.slow
def test_folders_that_cannot_be_used(tmp_path):
    output = doctor(tmp_path, "--output", "/proc/nowhere", "--data", str(tmp_path / "absent"), expect=1)
    (found,) = lines(output, "problem", "disk")
    assert "/proc/nowhere cannot be written to" in found and "choose another --output" in found
    (found,) = lines(output, "problem", "data")
    assert "absent" in found and "no such folder" in found and "give a folder" in found
    assert "2 problem(s)" in output.splitlines()[-1]


@pytest.mark.slow
def test_two_ranks(data, tmp_path):
    output = doctor(tmp_path, "--data", str(data), launcher="torchrun", expect=0)
    for check in ("rendezvous", *CHECKS, "data"):
        assert lines(output, "ok", check) or lines(output, "warning", check), output
    assert all(line.startswith((f"{socket.gethostname()}: ", "all ranks: ")) for line in output.splitlines()), output
    (found,) = lines(output, "ok", "rendezvous")
    assert "2 ranks on 1 node(s) sum right" in found and "64 MiB in" in found
    assert len(lines(output, "ok", "decoding")) == 1


@pytest.mark.slow
def test_a_problem_of_one_rank_fails_all(tmp_path):
    """Only the second rank has a wrong kernel; the first one prints that, and fails with it."""
    script = tmp_path / "second_rank_is_wrong.py"
    script.write_text(
        "import os, fpcn_kernels\n"
        "from fpcn_dist.doctor.examination import examine\n"
        "right = fpcn_kernels.pair_contrast\n"
        "if os.environ['RANK'] == '1':\n"
        "    fpcn_kernels.pair_contrast = lambda *args, **options: right(*args, **options) * 1.01\n"
        "status = examine(None, None)\n"
        "open(f'status{os.environ[\"RANK\"]}', 'w').write(str(status))\n"
    )
    argv = [*command("torchrun"), str(script)]
    output = subprocess.check_output(argv, cwd=tmp_path, env=environment(), text=True, timeout=120)
    assert (tmp_path / "status0").read_text() == (tmp_path / "status1").read_text() == "1"
    (found,) = lines(output, "problem", "pair_contrast")
    assert "rank 1" in found and "loss is wrong by 0.01 of" in found
    assert lines(output, "ok", "pair_contrast") and "1 problem(s)" in output.splitlines()[-1]


@pytest.mark.slow
def test_ranks_out_of_reach(tmp_path):
    """The rendezvous fails, and the machine is looked at all the same."""
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", free_port()))
        holder.listen()
        port = str(holder.getsockname()[1])
        env = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        output = doctor(tmp_path, expect=1, env=env)
    (found,) = lines(output, "problem", "rendezvous")
    assert f"MASTER_PORT {port}" in found and "already in use" in found
    assert lines(output, "ok", "decoding")


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_two_nodes(tmp_path):
    with SlurmCluster(tmp_path / "cluster") as cluster:
        script = tmp_path / "doctor.sbatch"
        script.write_text(f'#!/bin/bash\nsrun {sys.executable} {DOCTOR} --data "$1"\n')
        (tmp_path / "data").mkdir()
        job = cluster.submit(script, str(tmp_path / "data"), options=["--nodes=2"], env=environment(), cwd=tmp_path)
        assert cluster.wait(job)["ExitCode"] == "1:0"
        output = cluster.output(job)
    (found,) = lines(output, "ok", "rendezvous")
    assert found.startswith("node1: ") and "2 ranks on 2 node(s)" in found
    assert all(f"node{n}: ok      host name: node{n} has the address 10.99.0.{n}" in output for n in (1, 2))
    assert "gloo uses eth0" in output
    (found,) = lines(output, "problem", "data")
    assert found.startswith("node1: ") and "holds images" in found
    assert lines(output, "ok", "data")[0].startswith("node2: ")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not torch.distributed.is_initialized()


def test_a_wrong_kernel(alone, monkeypatch, capsys):
    right = fpcn_kernels.masked_pool

    def wrong(features, **options):
        pooled, mask, area = right(features, **options)
        return pooled + 0.01 * features.flatten(2).mean(2), mask, area

    monkeypatch.setattr(fpcn_kernels, "masked_pool", wrong)
    assert examine(None, None) == 1
    output = capsys.readouterr().out
    (found,) = lines(output, "problem", "masked_pool")
    assert "pooled is wrong by" in found and "constraints.txt" in found
    assert lines(output, "ok", "pair_contrast")


def found(look, *args) -> list[Finding]:
    return Check("check", functools.partial(look, *args), "call for help", seconds=0.5).run()


def test_packages_that_are_missing_or_old(monkeypatch):
    true = metadata.version

    def version(name: str) -> str:
        if name in ("ray", "nvidia-dali-cuda120", "nvidia-dali-cuda130"):
            raise metadata.PackageNotFoundError(name)
        return {"timm": "0.4.12"}.get(name) or true(name)

    monkeypatch.setattr(metadata, "version", version)
    text = [str(line) for line in found(software.packages)]
    assert any(line.startswith("problem ") and "timm 0.4.12 is not <2,>=1.0.15" in line for line in text), text
    assert any(line.startswith("warning ") and "DALI is not installed, so that torchvision" in line for line in text)
    assert any(line.startswith("warning ") and "ray is not installed" in line and "[ray]'" in line for line in text)
    assert any(line.startswith("ok ") and "deepspeed" in line for line in text)


def test_without_torch(tmp_path):
    """What needs it is not begun."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from fpcn_dist.doctor.examination import examine\nsys.exit(examine(None, None))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    (line,) = lines(done.stdout, "problem", "packages")
    assert "torch" in line and "pip install" in line
    assert not lines(done.stdout, "ok", "disk")


def test_an_import_that_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "fpcn_dist.data.loader", None)
    (line,) = found(computing.decoding, CPU)
    assert line.status == "problem" and "fpcn_dist.data.loader" in line.found and line.hint == "call for help"


def test_a_decoder_that_is_wrong(monkeypatch):
    for backend in ("dali", "torchvision"):
        monkeypatch.setattr(f"fpcn_dist.data.decoding.{backend}.view_pixels", lambda image, *_: 255 - image[:48, :48])
    (line,) = found(computing.decoding, CPU)
    assert line.status == "problem" and "grey levels" in line.found


def test_data_of_which_something_is_left_out(rocks, tmp_path):
    data = Path(shutil.copytree(rocks, tmp_path / "data"))
    (data / "runs" / "x").mkdir(parents=True)
    (data / "marble" / "notes.txt").touch()
    for number in range(3):
        shutil.copy(data / "marble" / f"{number:04d}.jpg", data / "basalt" / f"m{number}.jpg")
    first, *others = (str(finding) for finding in computing.data(data))
    assert first.startswith("ok ") and "75 images of 3 classes" in first
    assert all(line.startswith("warning ") for line in others) and len(others) == 3
    assert "runs/: left out: outputs of this project's commands" in others[0]
    assert ".txt: left out: 1 file(s)" in others[1]
    assert "identical files: in two classes or more" in others[2] and "3 picture(s) in basalt and marble" in others[2]


def test_data_that_are_unclear(rocks, tmp_path):
    shutil.copytree(rocks, tmp_path / "data" / "train")
    (tmp_path / "data" / "val").mkdir()
    (line,) = found(computing.data, tmp_path / "data")
    assert line.status == "problem" and "val/ (empty) holds no images" in line.found and "remove" in line.hint


def test_checks_that_fail_or_never_end():
    def crash() -> list[Finding]:
        raise RuntimeError("a segment\nand a traceback")

    (line,) = found(crash)
    assert str(line) == "problem check: failed: RuntimeError: a segment; call for help"
    (line,) = found(lambda: [time.sleep(3), ok("late")][1:])
    assert "did not end within 0.5 s" in line.found and stuck()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_torch_cannot_use(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (line,) = found(machine.gpus)
    assert str(line) == "ok      check: none: trains on the CPU"
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(machine, "DRIVER_FILES", (str(tmp_path / "nvidia[0-9]*"),))
    (line,) = found(machine.gpus)
    assert line.status == "problem" and "nvidia0" in line.found and "cannot use it" in line.found and line.hint
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (line,) = found(machine.gpus)
    assert line.status == "warning" and "CUDA_VISIBLE_DEVICES" in line.found


def test_little_shared_memory_and_one_core(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=64 * 2**20))
    assert any(line.status == "warning" and "--shm-size" in line.hint for line in found(machine.limits))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (line,) = found(machine.processor, 4)
    assert line.status == "warning" and "1 of 8 core(s)" in line.found and "--cpus-per-task" in line.hint


def test_names_and_networks(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "nobody.invalid")
    alone, among_others = (found(network.host_name, several)[0] for several in (False, True))
    assert (alone.status, among_others.status) == ("warning", "problem")
    assert "--local-addr 127.0.0.1" in str(alone.hint) and "--local-addr" not in str(among_others.hint)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert found(network.host_name, False)[0].status == "ok"
    (line,) = found(network.host_name, True)
    assert line.status == "problem" and "GLOO_SOCKET_IFNAME" in line.hint
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    assert any(line.status == "problem" and "eth77" in line.found for line in found(network.interfaces, False))
