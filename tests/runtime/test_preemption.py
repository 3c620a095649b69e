"""Signals end a step, and what has no steps, at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from fpcn_dist.runtime.errors import Preempted
from fpcn_dist.runtime.preemption import SIGNALS, Preemption, leaving_at_once
from fpcn_dist.runtime.ranks import CPU, Ranks

RANKS = Ranks(0, 1, 0, 1, CPU)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_block_that_leaves_at_once(number: signal.Signals) -> None:
    with Preemption(RANKS) as preemption:
        with (
            pytest.raises(Preempted, match=f"stopped by {number.name} while it slept"),
            leaving_at_once("while it slept"),
        ):
            os.kill(os.getpid(), number)
            time.sleep(60)
        os.kill(os.getpid(), number)  # is noted again
        assert preemption.agreed() == number.name


def test_a_signal_that_came_before_ends_it_at_its_begin() -> None:
    with Preemption(RANKS):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted), leaving_at_once("while it slept"):
            pytest.fail("it began")


def test_where_no_signal_is_noted_nothing_changes() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with leaving_at_once("while it slept"):
        assert [signal.getsignal(number) for number in SIGNALS] == before
