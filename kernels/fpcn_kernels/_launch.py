"""Whether the Triton kernels run, with what configuration, and the one place that launches them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

# Set by whoever wants a kernel faster than the table's configuration makes it, and has a minute: see choose().
AUTOTUNE = "FPCN_AUTOTUNE"

LaunchRecord = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""(kernel, grid, arguments, constants) of a launch."""

_recorder: list[LaunchRecord] | None = None
_tuned: dict[tuple[Hashable, ...], dict[str, int]] = {}


def use_triton(backend: str, device: torch.device, dtype: torch.dtype, limit: str | None = None) -> bool:
    """Whether the Triton kernels run for tensors on ``device`` that accumulate in ``dtype``.

    ``backend="auto"`` takes PyTorch where they cannot, and says so once.

    Args:
        limit: why this call is beyond the kernels, if it is.

    Raises:
        RuntimeError: ``backend="triton"``, and they cannot run.
    """
    if backend == "torch":
        return False
    reason = _hindrance(device) or limit
    if dtype == torch.float64:
        reason = reason or "they accumulate in float32, and an argument is float64"
    if backend == "triton":
        if reason:
            raise RuntimeError(f"backend 'triton': the kernels cannot run, as {reason}; use backend='auto' or 'torch'")
        return True
    if reason:
        _say_once(reason)
    # An interpreted kernel is for tests, which ask for it by name.
    return reason is None and device.type == "cuda"


@functools.cache
def _hindrance(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f"{device} has compute capability {capability}, below (8, 0)"
    if device.type == "meta" or interpreting():
        return None
    return f"the tensors are on {device.type}, not on a CUDA device"


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger("fpcn_kernels").warning("PyTorch runs instead of the Triton kernels, as %s", reason)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def rounds_products() -> bool:
    """Whether PyTorch may round the products of float32 matrices, by whichever of its two settings that was said.

    ``torch.get_float32_matmul_precision`` raises an error once the other has been used.
    """
    return torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a launch may fill: an H200's where ``device`` is no GPU, as launches can be recorded and
    interpreted anywhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """The size of the second-level cache: an H100's where ``device`` is no GPU, as for :func:`multiprocessors`."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 * 2**20


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the device of the first tensor, or its record inside
    :func:`recording`."""
    if _recorder is None:
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device_of(next(argument for argument in arguments if isinstance(argument, torch.Tensor))):
            kernel[grid](*arguments, **constants)
    else:
        _recorder.append((kernel, grid, arguments, constants))


@contextlib.contextmanager
def recording() -> Iterator[list[LaunchRecord]]:
    """Collect the records of all launches instead of launching.

    With tensors on the meta device this tells what an operation would launch at any shape, without a GPU.
    """
    global _recorder
    outer, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = outer


def tuning() -> bool:
    """Whether :func:`choose` times its candidates."""
    return os.environ.get(AUTOTUNE) == "1" and _recorder is None and not interpreting()


def choose(key: tuple[Hashable, ...], table: Sequence[dict[str, int]], run: Callable[[dict[str, int]], None]) -> None:
    """Run a kernel with a configuration for ``key``: the table's first, known to be good, unless the environment sets
    ``FPCN_AUTOTUNE=1``; then the fastest of the table, timed at the first call with this key in this process.

    Args:
        key: name of the kernel, dtypes and sizes; sizes that vary from call to call rounded to powers of two.
        table: candidates, the known-good one first.
        run: launches the kernel with one of them; may be called several times.
    """
    if tuning():
        if key not in _tuned:
            _tuned[key] = _fastest(table, run)
            logging.getLogger("fpcn_kernels").info("tuned %s: %s", key, _tuned[key])
        run(_tuned[key])
    else:
        run(table[0])


def _fastest(table: Sequence[dict[str, int]], run: Callable[[dict[str, int]], None]) -> dict[str, int]:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    milliseconds = {}
    for index, candidate in enumerate(table):
        # A candidate for a larger GPU may not fit this one.
        with contextlib.suppress(OutOfResources):
            milliseconds[index] = do_bench(functools.partial(run, candidate), warmup=5, rep=20)
    return table[min(milliseconds, key=milliseconds.__getitem__)]
