"""One writer for a folder: a lock that lives as long as its owner, on any file system that creates and renames files.

The owner rewrites the lock every few seconds. Another process that finds the lock watches it: if the lock changes, its
owner is alive, and the other process is refused; if the lock does not change for long enough, its owner is dead, and
the other process takes the lock over. No clocks of different machines are compared. An owner on this machine whose
process is seen is alive, and nothing is waited for; one whose process is not seen is waited for a few signs long, as it
may be another user's, hidden from this one, or that of a copy of this machine. Nothing is waited for either if the
owner ran in an earlier start of this batch job, or of these ranks by the same launcher.

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

from fpcn_dist.runtime import processes
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import printable

LOCK_FILE = ".lock"
_BEAT, _PATIENCE = 2.0, 60.0
"""Seconds between two signs of life, and seconds without one after which an owner is taken for dead."""
_SIGNS = 3
"""Signs of life that an owner on this machine, whose process is not seen, may miss before it is taken for dead."""
_LATEST = 0.75
"""Part of its patience after which an owner that can give no sign of life ends: before another takes its folder."""
_TRIES = 5
"""Times that a file is looked at, where a storage fails for a moment, before its fault counts."""
_LOST = 4
"""Exit status of an owner that finds its folder taken over, or can no longer keep it."""


@contextlib.contextmanager
def locked(folder: Path, *, beat: float = _BEAT, patience: float = _PATIENCE) -> Iterator[None]:
    """Own ``folder``, which exists, for the length of the block.

    An owner that was believed dead (suspended, or cut off from the storage) and finds another in its place ends its
    process at once: two writers would spoil what they write. So does one that could give no sign of life for so long
    that another would soon take it for dead.

    Args:
        folder: what to own.
        beat: seconds between two signs of life.
        patience: seconds without a sign of life after which an owner is taken for dead.

    Raises:
        UserError: another process that is alive owns it, or the lock cannot be written.
    """
    path, lock = folder / LOCK_FILE, _describe(secrets.token_hex(8), beat)
    if (owner := _acquire(path, lock, patience)) is not None:
        who = f"process {owner['process']} on {owner['host']}"
        if owner.get("job"):
            who += f", batch job {owner['job']}"
        hint = "wait for it, stop it, or choose another --output"
        raise UserError("--output", folder, f"another run is writing to it ({who})", hint)
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(path, lock, beat, patience, ended), daemon=True, name="lock")
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        with contextlib.suppress(OSError):  # the next owner takes over what cannot be removed
            if _token(_read(path)) == lock["token"]:
                path.unlink(missing_ok=True)


def _acquire(path: Path, lock: dict[str, Any], patience: float) -> dict[str, Any] | None:
    """Own the lock, taking it over from a dead owner; gives the owner instead where that is alive."""
    try:
        while not _create(path, lock):
            found = _read(path)
            alive = None if found is None else _lives(found)
            if found and alive is None:
                alive = _moves(path, found, min(patience, _SIGNS * found["every"]) if _is_here(found) else patience)
            if found is None or alive is None:
                continue
            if alive:
                return found
            if _take_over(path, lock, found, patience):
                return None
        return None
    except OSError as error:
        reason = f"cannot be locked ({error.strerror or error})"
        hint = "free some space there or choose another folder"
        raise UserError("--output", path.parent, reason, hint) from error


def _take_over(path: Path, lock: dict[str, Any], dead: dict[str, Any], patience: float) -> bool:
    """Put our lock in the place of a dead owner's; ``False`` where another has.

    Between a look at the lock and its replacement, the lock may have become another's. A process that replaces it
    therefore holds a second lock, on this replacement alone. If that process dies, too, its second lock is taken over
    in the same way.
    """
    claim = path.with_name(f"{LOCK_FILE}-{dead['token']}-claim")
    if _acquire(claim, lock, patience) is not None:
        time.sleep(0.01)
        return False
    try:
        if _token(_read(path)) != dead["token"]:
            return False
        _replace(path, lock)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _create(path: Path, lock: dict[str, Any]) -> bool:
    """Create the lock; gives whether it was free and is ours now.

    Whoever looks before it is written sees a damaged lock, and waits for it to change, as it does at once. A link to a
    whole file would never be seen so, but many network file systems and that of memory cards have no links.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(lock))
        return True
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _replace(path: Path, lock: dict[str, Any]) -> None:
    """Write the lock anew, whole; where there is no room for a second one, over the old one, which is as long."""
    draft, text = path.with_name(f"{LOCK_FILE}-{lock['token']}"), json.dumps(lock)
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        with open(path, "r+", encoding="utf-8") as file:
            file.write(text)


def _describe(token: str, beat: float) -> dict[str, Any]:
    return {
        "token": token,
        "host": socket.gethostname(),
        **processes.describe_self(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "launcher": processes.launcher(),
        "launch": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        "every": beat,
        "beats": "0" * 12,
    }


def _read(path: Path) -> dict[str, Any] | None:
    """Read what the lock says; gives ``None`` where there is no lock, or none any more.

    Raises:
        OSError: the storage does not give it, and does not after a while either.
    """
    damaged = {"token": "", "host": "?", "process": "?", "every": _BEAT, "beats": ""}
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(0.02)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return damaged | found if isinstance(found, dict) else damaged
        except FileNotFoundError:
            return None
        except ValueError:  # it is being written; or of a disk that lost its end, and never moves
            continue
        except OSError:
            if attempt == _TRIES - 1:
                raise
    return damaged


def _token(lock: dict[str, Any] | None) -> str | None:
    return None if lock is None else lock["token"]


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether an owner says that it is on this machine, among the processes that this one may see."""
    return processes.place() == (owner.get("machine"), owner.get("namespace"))


def _lives(owner: dict[str, Any]) -> bool | None:
    """Tell whether an owner is alive; gives ``None`` where only its signs can tell."""
    if _is_here(owner) and processes.lives(owner["process"], owner["started"]):
        return True
    # SLURM starts a job again when all of its last start has ended, and torchrun its ranks.
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if job is not None and owner.get("job") == job and owner["restart"] < restart:
        return False
    launcher, launch = processes.launcher(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return False if launcher is not None and owner.get("launcher") == launcher and owner["launch"] < launch else None


def _moves(path: Path, owner: dict[str, Any], patience: float) -> bool | None:
    """Watch whether an owner gives a sign of life in time; gives ``None`` where the lock changes hands or goes."""
    where = f"process {owner['process']} on {owner['host']}"
    waiting = f"waiting up to {patience:.0f} s to see whether it lives"
    print(f"{printable(path.parent)} was last used by {where}: {waiting}", flush=True)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = _read(path)
        if _token(found) != owner["token"]:
            return None
        if found and found["beats"] != owner["beats"]:
            return True
        time.sleep(min(0.2, patience / 10))
    return False


def _keep(path: Path, lock: dict[str, Any], beat: float, patience: float, ended: threading.Event) -> None:
    """Write the lock anew every ``beat`` seconds until the block has ended, through all that a storage does meanwhile.

    What fails once is tried again. A lock that was removed is made again, if nobody else was faster.
    """
    beats, kept = 0, time.monotonic()
    while not ended.wait(beat):
        beats += 1
        now = lock | {"beats": f"{beats:012d}"}
        try:
            found = _token(_read(path))
            if found is None and not _create(path, now):
                found = _token(_read(path))
            if found not in (None, "", lock["token"]):
                _end(f"{printable(path.parent)} has been taken over by another run; this one ends")
            if found is not None:
                _replace(path, now)
            kept = time.monotonic()
        except OSError as error:
            if time.monotonic() - kept > _LATEST * patience:
                lost = f"{printable(path.parent)} could not be kept from other runs ({error.strerror or error})"
                _end(f"{lost}; this one ends, and the same command goes on from its last checkpoint")


def _end(reason: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(_LOST)
