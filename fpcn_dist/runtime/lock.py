"""One writer for a folder: a lock that lives as long as its owner, on any file system that renames atomically.

The owner rewrites the lock every few seconds. Another process that finds the lock watches it: if the lock changes, its
owner is alive, and the other process is refused; if the lock does not change for long enough, its owner is dead, and
the other process takes the lock over. No clocks of different machines are compared. There is nothing to wait for if the
owner ran on this machine, where its process is looked up, or in an earlier start of this batch job.

filelock.SoftFileLease gives signs of life in a similar way, but it cannot refuse as soon as it sees that an owner is
alive, so that a user would always wait for a minute; it knows nothing of batch jobs that SLURM starts again; and its
signs are modification times, which NFS shows to other machines late.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import printable

LOCK_FILE = ".lock"
_BEAT, _PATIENCE = 5.0, 60.0
"""Seconds between two signs of life, and seconds without one after which an owner is taken for dead."""
_CLOCK_STEP = 30.0
"""Seconds by which the start of a process may seem to have moved, because this machine's clock was set."""
_LOST = 4
"""Exit status of an owner that finds its folder taken over."""


@contextlib.contextmanager
def locked(folder: Path, *, beat: float = _BEAT, patience: float = _PATIENCE) -> Iterator[None]:
    """Own ``folder``, which exists, for the length of the block.

    An owner that was believed dead (suspended, or cut off from the storage) and finds another in its place ends its
    process at once: two writers would spoil what they write.

    Args:
        folder: what to own.
        beat: seconds between two signs of life.
        patience: seconds without a sign of life after which an owner is taken for dead.

    Raises:
        UserError: another process that is alive owns it, or the lock cannot be written.
    """
    path, token = folder / LOCK_FILE, secrets.token_hex(8)
    if (owner := _acquire(path, token, patience)) is not None:
        who = f"process {owner['process']} on {owner['host']}"
        if owner.get("job"):
            who += f", batch job {owner['job']}"
        hint = "wait for it, stop it, or choose another --output"
        raise UserError("--output", folder, f"another run is writing to it ({who})", hint)
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(path, token, beat, ended), daemon=True, name="lock")
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        if (found := _read(path)) is not None and found["token"] == token:
            path.unlink(missing_ok=True)


def _acquire(path: Path, token: str, patience: float) -> dict[str, Any] | None:
    """Own the lock, taking it over from a dead owner; gives the owner instead where that is alive."""
    while not _create(path, token):
        found = _read(path)
        alive = _lives(found) if found else None
        if found and alive is None:
            alive = _moves(path, found, patience)
        if found is None or alive is None:
            continue
        if alive:
            return found
        if _take_over(path, token, found, patience):
            return None
    return None


def _take_over(path: Path, token: str, dead: dict[str, Any], patience: float) -> bool:
    """Put our lock in the place of a dead owner's; ``False`` where another has.

    Between a look at the lock and its replacement, the lock may have become another's. A process that replaces it
    therefore holds a second lock, on this replacement alone. If that process dies, too, its second lock is taken over
    in the same way.
    """
    claim = path.with_name(f"{LOCK_FILE}-{dead['token']}-claim")
    if _acquire(claim, token, patience) is not None:
        time.sleep(0.01)
        return False
    try:
        found = _read(path)
        if found is None or found["token"] != dead["token"]:
            return False
        _replace(path, token, beats=0)
        return True
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        claim.unlink(missing_ok=True)


def _create(path: Path, token: str) -> bool:
    """Create the lock; gives whether it was free and is ours now."""
    draft = path.with_name(f"{LOCK_FILE}-{token}-new")
    try:
        draft.write_text(json.dumps(_describe(token, beats=0)), encoding="utf-8")
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = f"cannot be locked ({error.strerror or error})"
    return UserError("--output", path.parent, reason, "free some space there or choose another folder")


def _replace(path: Path, token: str, beats: int) -> None:
    """Write the lock anew, whole."""
    draft = path.with_name(f"{LOCK_FILE}-{token}")
    draft.write_text(json.dumps(_describe(token, beats)), encoding="utf-8")
    os.replace(draft, path)


def _describe(token: str, beats: int) -> dict[str, Any]:
    return {
        "token": token,
        "host": socket.gethostname(),
        "namespace": _namespace(),
        "process": os.getpid(),
        "started": _start_of(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "beats": beats,
    }


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _start_of(process: int) -> float | None:
    """When a process of this machine began; ``None`` if there is none. A number that is used again has another start.

    A process that has ended, and whose parent has not asked for its status yet, is there no more.
    """
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    except psutil.Error:
        return None


def _read(path: Path) -> dict[str, Any] | None:
    """Read what the lock says; gives ``None`` where there is no lock, or none any more."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {"token": "", "host": "?", "process": "?", "beats": -1}  # of a disk that lost its end: never moves


def _lives(owner: dict[str, Any]) -> bool | None:
    """Tell whether an owner is alive; gives ``None`` where this machine cannot know."""
    if (owner["host"], owner.get("namespace")) == (socket.gethostname(), _namespace()):
        began = _start_of(owner["process"])
        return began is not None and abs(began - owner["started"]) < _CLOCK_STEP
    # SLURM starts a job again when all of its last start has ended.
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return False if job is not None and owner.get("job") == job and owner["restart"] < restart else None


def _moves(path: Path, owner: dict[str, Any], patience: float) -> bool | None:
    """Watch whether an owner gives a sign of life in time; gives ``None`` where the lock changes hands or goes."""
    where = f"process {owner['process']} on {owner['host']}"
    waiting = f"waiting up to {patience:.0f} s to see whether it lives"
    print(f"{printable(path.parent)} was last used by {where}: {waiting}", flush=True)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = _read(path)
        if found is None or found["token"] != owner["token"]:
            return None
        if found["beats"] != owner["beats"]:
            return True
        time.sleep(min(0.2, patience / 10))
    return False


def _keep(path: Path, token: str, beat: float, ended: threading.Event) -> None:
    """Write the lock anew every ``beat`` seconds until the block has ended."""
    beats = 0
    while not ended.wait(beat):
        found = _read(path)
        if found is None or found["token"] != token:
            reason = "has been taken over by another run; this one ends"
            print(f"error: {printable(path.parent)} {reason}", file=sys.stderr, flush=True)
            os._exit(_LOST)
        beats += 1
        with contextlib.suppress(OSError):  # a full disk must not end a run that may need no more of it
            _replace(path, token, beats)
