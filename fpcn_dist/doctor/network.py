"""These checks look at names, interfaces and ports of this machine, and whether the ranks reach each other."""

from __future__ import annotations

import fcntl
import os
import socket
import statistics
import struct
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from fpcn_dist.doctor.findings import Finding, ok, problem, warning
from fpcn_dist.runtime.limits import MIB
from fpcn_dist.runtime.ranks import Ranks

_SIOCGIFADDR = 0x8915
_LAUNCHERS_PORT = 29500
"""torchrun and deepspeed let ranks meet at this port unless they are told otherwise."""


def host_name(several_nodes: bool) -> Iterator[Finding]:
    """Tell whether this machine's name has an address, and whether other machines can use that address."""
    name = socket.gethostname()
    hint = f"give {name} its network address in /etc/hosts or the DNS"
    address = _address(name)
    if address is None:
        found, on_one = f"{name} has no address", "give torchrun --local-addr 127.0.0.1, or it waits for minutes"
        yield problem(found, hint) if several_nodes else warning(found, f"{on_one}, or {hint}")
    elif several_nodes and address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
        found = f"{name} has the address {address}, at which other nodes cannot reach it"
        yield problem(found, f"set GLOO_SOCKET_IFNAME to one of {', '.join(_outward())}, or {hint}")
    else:
        yield ok(f"{name} has the address {address}")


def interfaces(cuda: bool) -> Iterator[Finding]:
    """Tell which networks gloo, and on GPUs NCCL, will take."""
    known = _interfaces()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "").lstrip("^=").split(",")
        unknown = [name for name in wanted if name and not any(n.startswith(name) for n in known)]
        if unknown and not os.environ[variable].startswith("^"):
            found = f"{variable} names {', '.join(unknown)}, which is not there or has no address"
            yield problem(found, f"choose from {', '.join(known)}, or unset it")
    of_host_name = [name for name, address in known.items() if address == _address(socket.gethostname())]
    found = f"gloo uses {os.environ.get('GLOO_SOCKET_IFNAME') or ', '.join(of_host_name) or 'lo'}"
    if cuda:
        infiniband = [name for name in known if name.startswith("ib")]
        chosen = os.environ.get("NCCL_SOCKET_IFNAME") or ", ".join(infiniband or _outward())
        found += f", NCCL {chosen or 'lo'}"
    yield ok(f"{found}, of {', '.join(f'{name} {address}' for name, address in known.items())}")


def port() -> Iterator[Finding]:
    """Tell whether the launchers' port is free; this is for a process that no launcher started."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", _LAUNCHERS_PORT))
        except OSError as error:
            found = f"{_LAUNCHERS_PORT}, where launchers let ranks meet, cannot be used ({error.strerror})"
            yield warning(found, "give torchrun or deepspeed another --master-port, or end the run that holds it")
        else:
            yield ok(f"{_LAUNCHERS_PORT} is free for the ranks to meet")


def collectives(ranks: Ranks) -> Iterator[Finding]:
    """Tell whether sums over all ranks are right, and how long a small and a large one take."""
    index = torch.arange(8.0, device=ranks.device)
    vector = index + ranks.rank
    dist.all_reduce(vector)
    expected = ranks.world_size * index + ranks.world_size * (ranks.world_size - 1) / 2
    if not torch.equal(vector, expected):
        found = f"rank {ranks.rank} has the sum {vector.tolist()}, not {expected.tolist()}"
        yield problem(found, "give all ranks the same torch, and NCCL_DEBUG=INFO to see what NCCL does")
        return
    small = statistics.median(_seconds_of_sum(vector) for _ in range(20))
    large = _seconds_of_sum(torch.zeros(64 * MIB // 4, device=ranks.device))
    backend = "NCCL" if ranks.device.type == "cuda" else "gloo"
    yield ok(
        f"{ranks.world_size} ranks on {ranks.world_size // ranks.local_world_size} node(s) sum right by {backend}: "
        f"8 numbers in {small * 1e3:.2f} ms, 64 MiB in {large * 1e3:.0f} ms ({64 / large:.0f} MiB/s)"
    )


def _seconds_of_sum(tensor: torch.Tensor) -> float:
    dist.barrier(device_ids=[tensor.device.index] if tensor.is_cuda else None)
    start = time.perf_counter()
    dist.all_reduce(tensor)
    tensor[0].item()  # waits for the GPU
    return time.perf_counter() - start


def _address(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError:
        return None


def _interfaces() -> dict[str, str]:
    """Return the IPv4 addresses by the names of the interfaces that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            found[name] = socket.inet_ntoa(reply[20:24])
    return found


def _outward() -> list[str]:
    """Return the interfaces that may lead to other machines."""
    return [name for name in _interfaces() if not name.startswith(("lo", "docker", "veth"))]
