"""A folder has one writer, and a dead one does not keep it."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fpcn_dist.runtime import lock, processes
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import link_or_copy, write_text
from fpcn_dist.runtime.lock import LOCK_FILE, locked
from tests.helpers.launching import ROOT

WAITING = "was last used by process"
"""Part of what is said before a sign of life is waited for."""
OWNER = (
    "import sys, time\nfrom pathlib import Path\nfrom fpcn_dist.runtime.lock import locked\n"
    "with locked(Path(sys.argv[1]), beat=0.1, patience=1.0):\n    print('mine', flush=True)\n    time.sleep(60)\n"
)


def own(folder: Path, **env: str) -> subprocess.Popen[str]:
    """A process that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        cwd=ROOT,
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdout.readline() == "mine\n"
    return process


@pytest.fixture
def owner(tmp_path) -> Iterator[subprocess.Popen[str]]:
    process = own(tmp_path)
    with process:
        yield process
        process.kill()


def elsewhere(folder: Path, **changes: object) -> None:
    """Let the lock say that its owner is on another machine."""
    lock = json.loads((folder / LOCK_FILE).read_text())
    draft = folder / "draft"
    draft.write_text(json.dumps(lock | {"host": "elsewhere", "machine": "another boot"} | changes))
    draft.replace(folder / LOCK_FILE)


def test_the_owner_keeps_it_and_gives_it_back(tmp_path):
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).is_file()
        message = rf"another run is writing to it \(process {os.getpid()} on"
        with pytest.raises(UserError, match=message), locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_another_process_is_refused_while_the_owner_lives(tmp_path, owner, capfd):
    message = rf"process {owner.pid} on .*; wait for it, stop it, or choose another --output"
    with pytest.raises(UserError, match=message), locked(tmp_path):
        pass
    assert WAITING not in capfd.readouterr().out


def test_a_killed_owner_on_this_machine_is_dead_after_a_few_signs_that_do_not_come(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with locked(tmp_path, patience=3600):  # whoever waited for it would not end within the test
        pass


def test_an_owner_whose_process_is_hidden_or_on_a_copy_of_this_machine_lives_by_its_signs(tmp_path, owner, monkeypatch):
    """/proc may be mounted with hidepid; copies of a running virtual machine share all names, the boot's too."""
    monkeypatch.setattr(processes, "start_of", lambda process: None)
    monkeypatch.setattr(lock, "_SIGNS", 100)
    with pytest.raises(UserError, match=f"another run is writing to it .process {owner.pid} on"), locked(tmp_path):
        pass


def test_a_machine_of_the_same_name_is_another_one(tmp_path, owner):
    """Cloned images and containers share host names, and all first PID namespaces have one number."""
    found = json.loads((tmp_path / LOCK_FILE).read_text())
    assert lock._lives(found) is True
    assert lock._lives(found | {"machine": "another boot"}) is None
    assert lock._lives(found | {"machine": "another boot", "process": 3999999}) is None


def test_an_earlier_start_by_the_same_launcher_is_dead(tmp_path, owner, monkeypatch):
    found = json.loads((tmp_path / LOCK_FILE).read_text()) | {"process": 3999999}
    for name, value in (("RUN_ID", "none"), ("RESTART_COUNT", "2")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launcher = processes.launcher()
    assert launcher and f"process {os.getppid()} in" in launcher
    assert lock._lives(found | {"launcher": launcher, "launch": 1}) is False
    assert lock._lives(found | {"launcher": launcher, "launch": 2}) is None
    assert lock._lives(found | {"launcher": "process 1 in another boot", "launch": 1}) is None
    monkeypatch.setenv("WORLD_SIZE", "4")  # over two nodes, whose runs may be called alike
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert processes.launcher() is None


def test_a_file_system_without_links_can_be_locked_and_written_to(tmp_path, monkeypatch):
    """exFAT, Google Drive in Colab, many FUSE and SMB mounts; some refuse to synchronise a folder, too."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    synchronise = os.fsync

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        synchronise(descriptor)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", of_files)
    with locked(tmp_path), pytest.raises(UserError, match="another run is writing"), locked(tmp_path):
        pass
    write_text(tmp_path / "a", "text")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text"


def failing(call, error: int, times: int):
    """``call``, which fails so often before it works."""
    left = [times]

    def fail(*words, **options):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return call(*words, **options)

    return fail


def beats(folder: Path) -> int:
    return int(json.loads((folder / LOCK_FILE).read_text())["beats"] or 0)


def until_it_beats(folder: Path, more_than: int) -> None:
    deadline = time.monotonic() + 30
    while beats(folder) <= more_than:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize("call", ["read", "write"])
def test_a_storage_that_fails_for_a_moment_costs_a_sign_and_not_the_folder(tmp_path, monkeypatch, call, error):
    with locked(tmp_path, beat=0.02):
        until_it_beats(tmp_path, 0)
        with monkeypatch.context() as patch:
            if call == "read":
                patch.setattr(lock, "_read", failing(lock._read, error, 8))
            else:
                patch.setattr(lock, "_replace", failing(lock._replace, error, 8))
            until_it_beats(tmp_path, beats(tmp_path) + 2)
        until_it_beats(tmp_path, beats(tmp_path))


def test_one_that_cannot_keep_its_folder_ends_before_another_takes_it(tmp_path, monkeypatch):
    ended = threading.Event()

    def end(reason: str) -> None:
        assert "could not be kept from other runs (Stale file handle); this one ends" in reason
        ended.set()

    monkeypatch.setattr(lock, "_end", end)
    with locked(tmp_path, beat=0.02, patience=0.4), monkeypatch.context() as patch:
        patch.setattr(lock, "_read", failing(lock._read, errno.ESTALE, 10**9))
        assert ended.wait(30)


def test_where_there_is_no_room_for_a_second_lock_the_first_is_written_over(tmp_path, monkeypatch):
    with locked(tmp_path, beat=0.02), monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, errno.ENOSPC, 10**9))
        until_it_beats(tmp_path, beats(tmp_path) + 2)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_somebody_has_removed_is_made_again(tmp_path):
    with locked(tmp_path, beat=0.02):
        until_it_beats(tmp_path, 0)
        (tmp_path / LOCK_FILE).unlink()
        deadline = time.monotonic() + 30
        while not (tmp_path / LOCK_FILE).exists():
            assert time.monotonic() < deadline
        with pytest.raises(UserError, match="another run is writing"), locked(tmp_path):
            pass


def test_an_owner_that_is_dead_but_not_yet_waited_for_is_dead(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    while psutil.Process(owner.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(("moved", "lives"), [(5, True), (3600, None)])
def test_a_process_is_known_by_its_start_although_the_clock_may_be_set(tmp_path, owner, moved, lives):
    found = json.loads((tmp_path / LOCK_FILE).read_text())
    assert lock._lives(found | {"started": found["started"] + moved}) is lives


def test_an_owner_on_another_machine_that_lives_refuses(tmp_path):
    """Its signs of life are all that is seen of it."""
    with locked(tmp_path, beat=60):
        elsewhere(tmp_path)
        stop = threading.Event()

        def live() -> None:
            beats = 0
            while not stop.wait(0.2):
                beats += 1
                elsewhere(tmp_path, beats=beats)

        thread = threading.Thread(target=live)
        thread.start()
        try:
            with pytest.raises(UserError, match=r"process \d+ on elsewhere"), locked(tmp_path, patience=10):
                pass
        finally:
            stop.set()
            thread.join()


def test_an_owner_on_another_machine_that_is_silent_is_dead_after_a_while(tmp_path, owner, capfd):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    elsewhere(tmp_path)
    began = time.monotonic()
    with locked(tmp_path, patience=1.5):
        assert time.monotonic() - began >= 1.5
    assert WAITING in capfd.readouterr().out


def test_an_earlier_start_of_the_same_batch_job_is_dead(tmp_path, owner, monkeypatch, capfd):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    elsewhere(tmp_path, job="17", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path):
        assert WAITING not in capfd.readouterr().out


def test_an_owner_that_was_taken_for_dead_ends(tmp_path):
    process = own(tmp_path)
    with process:
        process.send_signal(signal.SIGSTOP)
        elsewhere(tmp_path)
        with locked(tmp_path, patience=0.5):
            process.send_signal(signal.SIGCONT)
            _, shown = process.communicate(timeout=10)
            assert process.returncode == 4 and "has been taken over by another run" in shown
            assert (tmp_path / LOCK_FILE).is_file()


def test_who_looked_at_a_dead_lock_does_not_take_its_successor(tmp_path, owner, monkeypatch):
    """The moment between looking and taking, drawn out: meanwhile another has taken the folder over."""
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    lives, others = lock._lives, []

    def slow(found):
        alive = lives(found)
        if not alive and not others:
            others.append(locked(tmp_path))
            others[0].__enter__()
        return alive

    monkeypatch.setattr(lock, "_lives", slow)
    with pytest.raises(UserError, match="another run is writing"), locked(tmp_path):
        pass
    others[0].__exit__(None, None, None)
    assert not list(tmp_path.glob(LOCK_FILE + "*"))


def test_of_many_that_find_it_dead_one_takes_it(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    inside, most, refused = [0], [0], []
    guard, start = threading.Lock(), threading.Barrier(8)

    def contend() -> None:
        start.wait()
        try:
            with locked(tmp_path):
                with guard:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.3)
                with guard:
                    inside[0] -= 1
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and refused


def test_a_damaged_lock_is_a_dead_one(tmp_path):
    (tmp_path / LOCK_FILE).write_text('{"tok')
    with locked(tmp_path, patience=0.5):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--output .*cannot be locked"), locked(tmp_path / "missing"):
        pass
