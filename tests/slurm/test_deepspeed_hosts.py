"""The deepspeed launcher over two hosts: started on each by hand, and by pdsh over SSH from one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT, Runs, environment, free_port, losses
from tests.slurm.machines import Machines, missing

MISSING = missing("sshd", "ssh", "ssh-keygen", "pdsh")
pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(300)]

SSHD = (
    'mount --bind "$KEYS/config" /etc/ssh/ssh_config; mkdir -p /run/sshd; /usr/sbin/sshd -D -e -o HostKey="$KEYS/id" '
    '-o AuthorizedKeysFile="$KEYS/id.pub" -o StrictModes=no -o UsePAM=no -o PidFile=none -o PermitRootLogin=yes &'
)
CONFIG = "Host *\n IdentityFile {}\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
ZERO = ["--engine.name", "deepspeed", "--engine.zero-stage", "2"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("hosts")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "id")], check=True)
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (folder / "config").write_text(CONFIG.format(folder / "id"))
    env = environment() | {"KEYS": str(folder), "GLOO_SOCKET_IFNAME": "eth0"}
    with Machines(folder / "machines", 2, ("true", SSHD), env) as machines:
        yield machines


@pytest.fixture(scope="module")
def one_process(runs: Runs) -> list[float]:
    return losses(runs.shared("single"))


def launcher(hosts: Machines, *options: str) -> list[str]:
    deepspeed = environment()["PATH"].partition(":")[0] + "/deepspeed"
    return [
        deepspeed,
        "--hostfile",
        str(hosts.folder.parent / "hostfile"),
        "--master_addr",
        "node1",
        "--master_port",
        str(free_port()),
        *options,
    ]


def test_started_on_each_host(hosts, runs, one_process):
    output = runs.folder / "deepspeed-no-ssh"
    base = launcher(hosts, "--no_ssh")

    def start(node: int) -> None:
        argv = [*base, "--node_rank", str(node - 1), *runs.train_argv(output, *ZERO)]
        hosts.run(*argv, node=node, cwd=ROOT, timeout=200)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, hosts.nodes))
    assert losses(output) == pytest.approx(one_process, rel=1e-4)


def test_started_by_pdsh_from_one_process(hosts, runs, one_process):
    output = runs.folder / "deepspeed-pdsh"
    # What the ranks need of the environment reaches the other hosts by this file.
    dotenv = Path(hosts.folder, ".deepspeed_env")
    names = ("PATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    dotenv.write_text("".join(f"{name}={(environment() | {'GLOO_SOCKET_IFNAME': 'eth0'})[name]}\n" for name in names))
    argv = [*launcher(hosts), *runs.train_argv(output, *ZERO)]
    hosts.run(*argv, node=1, cwd=ROOT, env={"DS_ENV_FILE": str(dotenv)}, timeout=200)
    assert losses(output) == pytest.approx(one_process, rel=1e-4)
