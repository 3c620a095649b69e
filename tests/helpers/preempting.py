"""Trainings that are told to stop in their midst."""

from __future__ import annotations


class StopAfter:
    """What :func:`fpcn_dist.training.loop.train` takes as ``preemption``: ends a training after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def agreed(self) -> str | None:
        self._left -= 1
        return "SIGTERM" if self._left == 0 else None
