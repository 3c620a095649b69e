"""A folder has one writer, and a dead one does not keep it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fpcn_dist.runtime import lock
from fpcn_dist.runtime.errors import UserError
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
    draft.write_text(json.dumps(lock | {"host": "elsewhere"} | changes))
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


def test_a_killed_owner_on_this_machine_is_known_to_be_dead_at_once(tmp_path, owner, capfd):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with locked(tmp_path):
        assert WAITING not in capfd.readouterr().out


def test_an_owner_that_is_dead_but_not_yet_waited_for_is_dead(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    while psutil.Process(owner.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(("moved", "lives"), [(5, True), (3600, False)])
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
