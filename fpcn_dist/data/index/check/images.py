"""Are these files images? Each one is decoded once by the decoder that training uses, and the answer is remembered."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from fpcn_dist.data.blob import Blob, FileState, file_state
from fpcn_dist.data.decoding.backends import has_dali, open_backend
from fpcn_dist.data.index.check.cache import CheckCache
from fpcn_dist.data.index.check.checking import Check, check_blobs
from fpcn_dist.recipe.schema import DecodingBackend
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.files import cache_home
from fpcn_dist.runtime.preemption import leaving_at_once

_PROGRESS_FROM = 2000
"""Files to check from which on a progress bar is worth showing (a few seconds)."""
_STATES_AT_A_TIME = 1000
_STATE_THREADS = 16
"""A network disk takes a millisecond for each file's state, and answers many questions at once."""


class Refused(NamedTuple):
    """An image that was left out: its path relative to the data folder, and why."""

    path: str
    reason: str


def check_images(
    blobs: Sequence[Blob], max_pixels: int, cache: Path | None = None, *, backend: DecodingBackend = "auto"
) -> list[Check]:
    """Read and decode images, or recall what doing so gave before, in the given order.

    That is done in child processes (:mod:`fpcn_dist.data.index.check.checking`), and kept every few seconds. Prints a
    line where the backend is not the one that is preferred.

    Args:
        blobs: encoded images.
        max_pixels: images whose header announces more pixels are refused without being decoded.
        cache: a file that remembers results by :attr:`Blob.key` and by the state of the file that holds the image;
            ``None`` remembers nothing. Several processes may share it.
        backend: the recipe's ``data.backend``.

    Raises:
        UserError: the backend is not installed, or an object store cannot be read.
        Preempted: a signal of :data:`fpcn_dist.runtime.preemption.SIGNALS` came, in a process that heeds them.
    """
    if backend == "auto" and not has_dali():
        print("DALI is not installed: torchvision decodes the images, on the CPU (data.backend auto)", flush=True)
    opened = open_backend(backend)
    names, states = [blob.key for blob in blobs], _states(blobs)
    memory = CheckCache(cache, f"{opened.version}/{max_pixels}")
    checks = [memory.recall(name, state) for name, state in zip(names, states, strict=True)]
    stale = [i for i, check in enumerate(checks) if check is None]
    # A job that is warned again and again in its first seconds gets on: once all is known, it leaves after a step.
    with (
        contextlib.closing(memory),
        leaving_at_once("while the images were checked") if stale else contextlib.nullcontext(),
    ):
        found = check_blobs([blobs[i] for i in stale], opened.decoder, max_pixels)
        with contextlib.closing(found):
            for at, check in track(
                found,
                description="Checking images",
                total=len(stale),
                console=Console(stderr=True),
                transient=True,
                disable=len(stale) < _PROGRESS_FROM,
            ):
                i = stale[at]
                checks[i] = check
                memory.note(names[i], states[i], check)
    return [check for check in checks if check is not None]


def cache_file(root: Address) -> Path:
    """Where the checks of a data folder are remembered: in the user's cache folder, one file for each data folder."""
    return cache_home() / f"images-{hashlib.sha256(os.fsencode(str(root.resolve()))).hexdigest()[:16]}.json"


def _states(blobs: Sequence[Blob]) -> list[FileState | None]:
    """The state of each one's file, or of a remote object as it was listed; ``None`` where there is none."""
    paths = list({blob.path: None for blob in blobs if blob.stored is None})
    parts = [paths[i : i + _STATES_AT_A_TIME] for i in range(0, len(paths), _STATES_AT_A_TIME)]
    with ThreadPoolExecutor(_STATE_THREADS) as pool:
        states = [state for part in pool.map(lambda part: [file_state(path) for path in part], parts) for state in part]
    state_of = dict(zip(paths, states, strict=True))
    return [blob.stored[:2] if blob.stored else state_of[blob.path] for blob in blobs]
