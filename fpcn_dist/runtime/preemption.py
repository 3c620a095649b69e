"""Leaving in good order before the machine is taken away: a signal to any rank, and all stop after the same step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

from fpcn_dist.runtime.errors import Preempted
from fpcn_dist.runtime.ranks import Ranks

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""SIGUSR1 is what batch scripts ask SLURM to send before a time limit; SIGTERM ends what is preempted at once."""


class Preemption:
    """Notes signals, and lets all ranks know of those that any of them has got.

    Signals are noted while its ``with`` block runs; they must be installed by a process's main thread.

    Args:
        ranks: this process among all.
    """

    _current: Preemption | None = None

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._signal = ranks, 0
        self._at_once: str | None = None
        self._agreement: tuple[dist.Work, torch.Tensor] | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._outer, Preemption._current = Preemption._current, self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        Preemption._current = self._outer
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        if kind is not None and issubclass(kind, RuntimeError):
            return  # a rank is lost, and another may wait for this one to end before it answers
        with contextlib.suppress(RuntimeError):  # of a rank that is lost, and reported elsewhere
            self._conclude()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self._at_once is not None:
            raise Preempted(signal.Signals(number).name, self._at_once)

    def agreed(self) -> str | None:
        """Give the name of a signal that some rank had got before its last step, or ``None``. Collective, once a step.

        All ranks get the same answer. They agree while the next step is computed, so that no rank waits for another.
        """
        if self._ranks.group is None:
            found = self._signal
        else:
            found = self._conclude()
            # On the CPU, where the group is gloo's, so that no GPU is waited for.
            mine = torch.tensor(self._signal, dtype=torch.int32)
            work = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._ranks.group, async_op=True)
            assert work is not None
            self._agreement = work, mine
        return signal.Signals(found).name if found else None

    def _conclude(self) -> int:
        agreement, self._agreement = self._agreement, None
        if agreement is None:
            return 0
        work, largest = agreement
        work.wait()
        return int(largest)


@contextlib.contextmanager
def leaving_at_once(when: str) -> Iterator[None]:
    """In this block, end at the signal that a :class:`Preemption` would note for the end of the next step.

    It changes nothing where none is in force, and outside of the main thread, where no signal arrives.

    Args:
        when: what was being done, such as "while the images were checked".

    Raises:
        Preempted: a signal came, or had come before.
    """
    noting = Preemption._current
    if noting is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    noting._at_once = when
    try:
        if noting._signal:
            raise Preempted(signal.Signals(noting._signal).name, when)
        yield
    finally:
        noting._at_once = None
