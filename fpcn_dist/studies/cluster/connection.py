"""The Ray cluster that commands run on: one that is there, or one of their own on this machine alone.

Everything that imports ray goes through here, as Ray reads its settings from the environment when it is imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from fpcn_dist.runtime.cores import usable_cores
from fpcn_dist.runtime.errors import Preempted, UserError
from fpcn_dist.runtime.preemption import SIGNALS


class Slots(NamedTuple):
    """What a cluster offers for training: places that a rank can have to itself.

    Attributes:
        kind: "GPU", or "CPU" where no node has a GPU: then a place is a node, or some of its cores.
        count: how many places there are.
        cpus: CPU cores that come with each of them.
    """

    kind: str
    count: int
    cpus: int

    @property
    def bundle(self) -> dict[str, float]:
        """The resources that a rank asks of Ray, as the bundle of a placement group."""
        gpu = {"GPU": 1.0} if self.kind == "GPU" else {}
        return gpu | {"CPU": float(self.cpus)}

    @property
    def options(self) -> dict[str, float]:
        """The resources that a rank asks of Ray, as options of a remote function."""
        return {"num_cpus": self.bundle["CPU"], "num_gpus": self.bundle.get("GPU", 0.0)}


@contextlib.contextmanager
def connect_ray(address: str | None) -> Iterator[Any]:
    """The module ``ray``, connected.

    Without an address a Ray of its own is started and ended again: it listens on the loopback interface only and
    asks for a token, and no other Ray on this machine is touched. With one ("auto", or HOST:PORT) that cluster is
    joined, with the token that the environment has (``RAY_AUTH_TOKEN``), and left as it was.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address, or it refuses us.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("ray", None, "the package is not installed", "pip install 'fpcn-dist[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    with told_to_stop(), _local() if address is None else _remote(address) as ray, interruptible():
        yield ray


_told: list[str] = []
"""Names of the signals that have told this process to stop."""


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """What a signal but Ctrl-C has interrupted ends as a run of one rank does.

    Raises:
        Preempted: this process got SIGTERM or SIGUSR1.
    """
    _told.clear()
    try:
        yield
    except KeyboardInterrupt:
        if not _told:
            raise
        again = "the same command goes on from there (a search with --resume)"
        raise Preempted(_told[0], "with the checkpoints of its runs on the disk", again) from None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 interrupt the block as Ctrl-C does; once interrupted, nothing disturbs what tidies up.

    KeyboardInterrupt is what Ray and Tune let through: any other exception, raised between two lines of theirs, they
    would take for the failure of a trial.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        if number != signal.SIGINT:
            _told.append(signal.Signals(number).name)
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, *SIGNALS)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        raise  # the signals stay ignored while Ray is ended
    except BaseException:
        _restore(before)
        raise
    _restore(before)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def _local() -> Iterator[Any]:
    if "ray" not in sys.modules:  # else whoever imported it has chosen
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Ray's switch for desktops: every service on 127.0.0.1.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    # Unix sockets below it may have names of at most 107 bytes.
    folder = tempfile.mkdtemp(prefix="fpcn-", dir="/tmp")
    try:
        # "local": RAY_ADDRESS may name another cluster.
        ray.init(
            address="local",
            num_cpus=usable_cores(),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=folder,
        )
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _remote(address: str) -> Iterator[Any]:
    if os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    _require_answer(address)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, " ".join(str(error).split())[:200]) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Refuse an address where nobody answers: Ray would end the whole process.

    Raises:
        UserError: nobody answers there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, detail: str) -> UserError:
    hint = "start one (ray start --head), set RAY_AUTH_TOKEN if it has a token, or leave --address out"
    return UserError("--address", address, f"no Ray cluster can be joined there ({detail})", hint)


def find_slots(ray: Any, cpus: int | None = None) -> Slots:
    """The places of the cluster as it is now.

    Args:
        ray: the module, connected.
        cpus: CPU cores of a place where there are no GPUs; ``None``: a whole node.

    Raises:
        UserError: it has no node with a free CPU core, or with as many.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise UserError("--address", None, "the cluster has no node with a CPU core", "add nodes to it")
    with_gpus = [node for node in nodes if node.get("GPU")]
    if with_gpus:
        share = min(int(node["CPU"] // node["GPU"]) for node in with_gpus)
        return Slots("GPU", sum(int(node["GPU"]) for node in with_gpus), share)
    if cpus is None:
        return Slots("CPU", len(nodes), min(int(node["CPU"]) for node in nodes))
    count = sum(int(node["CPU"] // cpus) for node in nodes)
    if not count:
        most = max(int(node["CPU"]) for node in nodes)
        raise UserError("data.threads", cpus, f"no node of the cluster has more than {most} cores", f"use {most}")
    return Slots("CPU", count, cpus)


def task_result(ray: Any, task: Any) -> Any:
    """The result of a remote function.

    Raises:
        UserError: the remote function raised it.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
