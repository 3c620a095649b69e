"""Ranks and commands in processes that are forked from one which has imported what they need.

To import that takes five seconds of processor time, which each of hundreds of processes would spend.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

_IMPORTED = ["tests.helpers.preloaded"]


def start_ranks(main: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """Call ``main(rank, *arguments)`` in as many processes, which have computed nothing before; wait for their end.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them has failed.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    start_processes(main, arguments, nprocs=ranks, start_method="forkserver")


def run_script(
    argv: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script of this project with its arguments, as ``subprocess.run`` would after ``python``.

    Raises:
        subprocess.TimeoutExpired: it has not ended in so many seconds, and was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with tempfile.TemporaryDirectory() as streams:
        out, err = Path(streams, "out"), Path(streams, "err")
        process = context.Process(target=_script, args=(list(argv), folder, dict(environment), out, err))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout)
        status = process.exitcode
        assert status is not None
        return subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())


def _script(argv: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the variable was read with the import
    sys.argv = argv
    sys.path[0:0] = [os.path.dirname(argv[0])]
    runpy.run_path(argv[0], run_name="__main__")
