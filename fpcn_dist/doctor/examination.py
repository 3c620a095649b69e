"""This module runs all checks in their order, on one rank or many, and prints what they found."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fpcn_dist.doctor import software
from fpcn_dist.doctor.findings import Check, Finding, problem, stuck
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.launchers import told
from fpcn_dist.runtime.terminal import Terminal

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from fpcn_dist.runtime.ranks import Ranks

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
_ELSEWHERE = datetime.timedelta(minutes=3)
"""A rank waits so long for the others to look at themselves, which takes seconds where nothing is wrong."""
_SOFTWARE = [
    Check("python", software.python, "pip install -e . in the checkout"),
    Check("packages", software.packages, "pip install -e . in the checkout"),
]


class _Place(NamedTuple):
    """The rank that found something, and its machine."""

    host: str
    rank: int


class _Report:
    """A report holds the findings so far. Local rank 0 of each machine prints them as they come; others keep theirs."""

    def __init__(self, place: _Place, *, several: bool, printing: bool) -> None:
        self.place, self.findings = place, list[Finding]()
        self._several, self._printing = several, printing
        self._console = Terminal()

    def add(self, findings: Iterable[Finding], *, shown: bool = True) -> None:
        for finding in findings:
            self.findings.append(finding)
            if shown:
                self.print(str(finding), _COLOURS[finding.status], self.place.host)

    def print(self, line: str, colour: str, where: str) -> None:
        if self._printing:
            # One write a line, so that those of several ranks do not mix.
            self._console.print(f"{where}: {line}" if self._several else line, style=colour)


def examine(output: Path | None, data: Address | None) -> int:
    """Run all checks and print a line for each thing found; a launcher has every rank call this.

    Args:
        output: where runs are to go; default: runs/ where it exists, else the current folder.
        data: an image folder to look at.

    Returns:
        Exit status, the same on every rank: 1 if any of them found a problem.
    """
    if importlib.util.find_spec("torch") is None:
        report = _Report(_Place(socket.gethostname(), 0), several=False, printing=True)
        for check in _SOFTWARE:
            report.add(check.run())
        return _conclude(report, report.findings, report.place.host)
    with contextlib.ExitStack() as stack:
        ranks, unreachable = _join(stack)
        # connect() has written here what any launcher said.
        rank, local_rank = told("RANK", 0), told("LOCAL_RANK", 0)
        several = told("WORLD_SIZE", 1) > 1
        report = _Report(_Place(socket.gethostname(), rank), several=several, printing=local_rank == 0)
        report.add(unreachable)
        patient = None
        if ranks is not None and several:
            report.add(found := _sums(ranks), shown=ranks.first)
            patient = _patient_group() if found[0].status == "ok" else None
        output = output or (Path("runs") if Path("runs").is_dir() else Path())
        for check in _checks(output, data, ranks, local_rank):
            report.add(check.run())
        others = _gather(report, patient) if patient else None
        everything = list(report.findings) if others is None else others
        if data is not None and (others is not None or rank == 0):
            look_at_data = functools.partial(_look_at_data, data)
            found = look_at_data() if ranks is None or others is None else ranks.on_first(look_at_data)
            found = [Finding(*fields) for fields in found]  # from one rank to another they go as lists
            report.add(found, shown=rank == 0)
            everything = [*everything, *found]
        status = _conclude(report, everything, "all ranks" if others is not None else report.place.host)
        if stuck():  # which could keep the group of the ranks from being taken down
            sys.stdout.flush()
            os._exit(status)
    return status


def _join(stack: contextlib.ExitStack) -> tuple[Ranks | None, list[Finding]]:
    """Join the other ranks; where that fails, the first value is ``None`` and the findings say why."""
    import torch

    from fpcn_dist.runtime.ranks import MEETING_TIMEOUT, connect

    joined: list[Ranks] = []

    def join() -> list[Finding]:
        joined.append(stack.enter_context(connect()))
        return []

    # Where only one side of a connection fails, gloo lets the other wait without end.
    seconds = MEETING_TIMEOUT.total_seconds() + 5
    hint = (
        "see that all ranks are started and reach MASTER_ADDR at MASTER_PORT; between nodes with several networks or "
        "names for 127.0.1.1 set GLOO_SOCKET_IFNAME, and with GPUs NCCL_SOCKET_IFNAME, to the one that joins them"
    )
    found = Check("rendezvous", join, hint, seconds).run()
    if found:
        return None, found
    (ranks,) = joined
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)  # connect() did so for its thread only
    return ranks, []


def _checks(output: Path, data: Address | None, ranks: Ranks | None, local_rank: int) -> list[Check]:
    """List the checks of this rank: of its own device, and on the first rank of a machine also of the machine."""
    from fpcn_dist.doctor import computing, machine, network
    from fpcn_dist.runtime.ranks import own_device

    device = ranks.device if ranks else own_device()
    ranks_here = told("LOCAL_WORLD_SIZE", 1)
    nodes = told("WORLD_SIZE", 1) // ranks_here
    cuda = device.type == "cuda"

    def check(
        name: str, look: Callable[..., Iterable[Finding]], *args: object, hint: str, seconds: float = 30
    ) -> Check:
        return Check(name, functools.partial(look, *args), hint, seconds)

    reinstall = "install the versions of constraints.txt"
    of_machine = [
        *_SOFTWARE,
        check("gpu", machine.gpus, hint="see what nvidia-smi says", seconds=60),
        *([check("nccl", machine.nccl, hint=reinstall)] if cuda else []),
        check("processor", machine.processor, ranks_here, hint="look at this machine's limits"),
        check("memory", machine.memory, ranks_here, hint="look at this machine's limits"),
        check("limits", machine.limits, hint="look at this machine's limits"),
        check("disk", machine.disk, output, hint="choose another --output", seconds=60),
        check("host name", network.host_name, nodes > 1, hint="look at /etc/hosts and /etc/resolv.conf"),
        check("network", network.interfaces, cuda, hint="look at the machine's network"),
        *([] if "RANK" in os.environ else [check("port", network.port, hint="look at the machine's network")]),
    ]
    of_rank = [
        check("decoding", _on, device, computing.decoding, device, hint=reinstall),
        # Triton compiles them at the first call.
        check("masked_pool", _on, device, computing.masked_pool, device, hint=reinstall, seconds=90),
        check("pair_contrast", _on, device, computing.pair_contrast, device, hint=reinstall, seconds=90),
    ]
    if data is not None and local_rank == 0 and told("RANK", 0) > 0:
        of_machine.append(check("data", computing.data_is_here, data, hint="see whether its file system answers"))
    return [*(of_machine if local_rank == 0 else []), *of_rank]


def _on(device: torch.device, look: Callable[..., Iterable[Finding]], *args: object) -> Iterable[Finding]:
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)  # a new thread begins on the first GPU
    return look(*args)


def _sums(ranks: Ranks) -> list[Finding]:
    """Sum over all ranks, and give up before NCCL ends a process that waits."""
    from fpcn_dist.doctor import network

    look = functools.partial(_on, ranks.device, network.collectives, ranks)
    return Check("rendezvous", look, "see the other ranks' lines, and what a firewall lets pass", seconds=50).run()


def _patient_group() -> dist.ProcessGroup:
    import torch.distributed as dist

    group = dist.new_group(timeout=_ELSEWHERE, backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group


def _gather(report: _Report, patient: dist.ProcessGroup) -> list[Finding] | None:
    """Return all ranks' findings, ``None`` where a rank is lost; print what only others on this machine found wrong."""
    import torch.distributed as dist

    everyone: list[tuple[_Place, list[Finding], dict[str, str]]] = [(report.place, [], {})] * patient.size()

    def exchange() -> list[Finding]:
        dist.all_gather_object(everyone, (report.place, report.findings, software.versions()), group=patient)
        return []

    hint = "see the other ranks' lines, and whether the network holds"
    if lost := Check("rendezvous", exchange, hint, _ELSEWHERE.total_seconds()).run():
        report.add(lost)
        return None
    shown = set(report.findings)
    for place, findings, _ in everyone:
        for finding in findings:
            if place.host == report.place.host and finding.status != "ok" and finding not in shown:
                shown.add(finding)
                report.print(str(finding), _COLOURS[finding.status], f"{place.host} rank {place.rank}")
    everything = [finding for _, findings, _ in everyone for finding in findings]
    first = everyone[0][2]
    for place, _, versions in everyone:
        if versions != first:
            found = f"{place.host} has {versions}, and the first rank {first}"
            different = problem(found, "install the same on all nodes")._replace(check="packages")
            report.add([different], shown=report.place.rank == 0)
            return [*everything, different]
    return everything


def _look_at_data(folder: Address) -> list[Finding]:
    from fpcn_dist.doctor import computing

    look = functools.partial(computing.data, folder)
    return Check("data", look, "see whether its file system answers", seconds=3600).run()


def _conclude(report: _Report, everything: list[Finding], where: str) -> int:
    """Let the first rank print the last line, and return the exit status."""
    problems, warnings = (sum(f.status == status for f in everything) for status in ("problem", "warning"))
    if report.place.rank == 0:
        worst = "problem" if problems else "warning" if warnings else "ok"
        report.print(f"{problems} problem(s), {warnings} warning(s)", _COLOURS[worst], where)
    return 1 if problems else 0
