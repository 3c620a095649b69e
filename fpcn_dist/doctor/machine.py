"""These checks look at the GPUs, the processor, the memory and the disk of this machine."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import torch
from torch.cuda import nccl as torch_nccl

from fpcn_dist.doctor.findings import Finding, ok, problem, warning
from fpcn_dist.runtime.cores import usable_cores
from fpcn_dist.runtime.limits import GIB, MIB, raise_open_files, shortages
from fpcn_dist.runtime.memory import free_and_total

DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidia[0-9]*", "/dev/dxg")
"""Files of these patterns are only there where the driver of an NVIDIA GPU is; the last is for Linux under Windows."""
_MEASURED = 256 * MIB
_BLOCK = 32 * MIB


def gpus() -> Iterator[Finding]:
    """Tell what GPUs there are, and whether each of them computes."""
    if not torch.cuda.is_available():
        yield _without_gpu()
        return
    kinds: Counter[str] = Counter()
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        kinds[f"{found.name} ({found.total_memory / GIB:.0f} GiB, compute capability {found.major}.{found.minor})"] += 1
        if (result := torch.ones(8, device=f"cuda:{index}").sum().item()) != 8:
            yield problem(f"cuda:{index} computes 8 x 1 = {result}", "leave it out through CUDA_VISIBLE_DEVICES")
        if (found.major, found.minor) < (8, 0):
            yield warning(f"cuda:{index} is too old for the Triton kernels", "expect PyTorch's slower path")
    shown = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    yield ok(f"{shown}; {_driver()}, PyTorch for CUDA {torch.version.cuda}")


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", version.read_text()) if version.exists() else None
    driver = f"driver {found[0]}" if found else "driver"
    newest = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(newest))
    return f"{driver} for CUDA up to {newest.value // 1000}.{newest.value % 1000 // 10}"


def _without_gpu() -> Finding:
    files = [file for pattern in DRIVER_FILES for file in glob(pattern)]
    if not files:
        return ok("none: trains on the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return warning(f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}: trains on the CPU", "unset it to use the GPU")
    if torch.version.cuda is None:
        found = f"there is one ({files[0]}), but this PyTorch was built without CUDA"
        return problem(found, "install torch and torchvision of a CUDA build")
    try:
        torch.cuda.init()
        reason = "it reports no device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    found = f"there is one ({files[0]}), but PyTorch for CUDA {torch.version.cuda} cannot use it: {reason}"
    return problem(found, "update the NVIDIA driver, or install torch and DALI for the CUDA version that it supports")


def nccl() -> Iterator[Finding]:
    """Tell the version of NCCL, by which GPUs exchange data."""
    if torch.distributed.is_nccl_available():
        yield ok(".".join(map(str, torch_nccl.version())))
    else:
        yield problem("this PyTorch has none, so several GPUs cannot train together", "install torch from PyPI")


def processor(ranks_here: int) -> Iterator[Finding]:
    """Tell how many cores this process may run on."""
    usable, cores = usable_cores(), os.cpu_count() or 1
    found = f"{usable} of {cores} core(s) for {ranks_here} rank(s)"
    if usable == 1 < cores:
        yield warning(found, "let it run on more (SLURM: --cpus-per-task), or decoding will limit the training")
    elif cores < ranks_here:
        yield warning(found, "start fewer ranks on this machine")
    else:
        yield ok(found)


def memory(ranks_here: int) -> Iterator[Finding]:
    """Tell how much memory is free."""
    free, total = free_and_total()
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 2 * GIB * ranks_here:
        yield warning(found, "end other programs, or start fewer ranks here: each takes about 2 GiB")
    else:
        yield ok(found)


def limits() -> Iterator[Finding]:
    """Tell whether there are open files, shared memory and room for temporary files enough."""
    found = list(shortages(shared=True))
    yield from (warning(f"{short.name}: {short.found}", short.hint) for short in found)
    if not found:
        shared = shutil.disk_usage("/dev/shm").total / GIB
        yield ok(f"{raise_open_files()} open files, {shared:.1f} GiB in /dev/shm, room in {tempfile.gettempdir()}")


def disk(output: Path) -> Iterator[Finding]:
    """Tell speed and free space where runs go; looks in the nearest folder that exists, so that it need make none."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    hint = "choose another --output"
    try:
        write, read = _speed(folder)
    except OSError as error:
        yield problem(f"{output} cannot be written to ({error.strerror})", hint)
        return
    free = shutil.disk_usage(folder).free
    found = f"{folder} writes {write / MIB:.0f} MiB/s, reads {read / MIB:.0f} MiB/s, {free / GIB:.0f} GiB free"
    if write < 20 * MIB:
        yield warning(f"{found}, so a checkpoint of ResNet-101 takes {350 * MIB / write:.0f} s", hint)
    elif free < 10 * GIB:
        yield warning(found, "free some space: a run of ResNet-101 with its checkpoints takes some GiB")
    else:
        yield ok(found)


def _speed(folder: Path, seconds: float = 15.0) -> tuple[float, float]:
    """Measure bytes per second, written until they are on the disk, and read, each for about ``seconds`` at most."""
    block = os.urandom(_BLOCK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:  # it has no name, so it goes even if we are killed
        start, written = time.monotonic(), 0
        while written < _MEASURED and time.monotonic() - start < seconds:
            written += file.write(block)
            os.fdatasync(file.fileno())
        write = written / (time.monotonic() - start)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start, done = time.monotonic(), 0
        while time.monotonic() - start < seconds and (part := file.read(_BLOCK)):
            done += len(part)
        return write, done / (time.monotonic() - start)
