"""Signals interrupt what runs many trainings as Ctrl-C does, and nothing disturbs what tidies up afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from fpcn_dist.runtime.errors import Preempted
from fpcn_dist.runtime.preemption import SIGNALS
from fpcn_dist.studies.cluster.connection import interruptible, told_to_stop

ALL = (signal.SIGINT, *SIGNALS)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[object]]:
    """Those of this process, which has them again after the test."""
    before = [signal.getsignal(number) for number in ALL]
    yield before
    for number, handler in zip(ALL, before, strict=True):
        signal.signal(number, handler)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("number", ALL)
def test_a_signal_interrupts_once_and_says_who_it_was(number: signal.Signals) -> None:
    tidied = []
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Preempted) as caught, told_to_stop():
        try:
            with interruptible():
                os.kill(os.getpid(), number)
                time.sleep(60)
        finally:
            for again in ALL:
                os.kill(os.getpid(), again)
            tidied.append(True)
    assert tidied
    if number != signal.SIGINT:
        assert str(caught.value).startswith(f"stopped by {number.name} with the checkpoints of its runs on the disk")
        assert isinstance(caught.value, Preempted) and caught.value.status in (0, 75)


def test_what_ends_otherwise_leaves_the_handlers_as_they_were(handlers: list[object]) -> None:
    with told_to_stop(), interruptible():
        assert [signal.getsignal(number) for number in ALL] != handlers
    assert [signal.getsignal(number) for number in ALL] == handlers
    with pytest.raises(ValueError, match="mine"), told_to_stop(), interruptible():
        raise ValueError("mine")
    assert [signal.getsignal(number) for number in ALL] == handlers
