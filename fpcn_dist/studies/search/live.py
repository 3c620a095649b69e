"""The trials while they run: on a terminal a table that renews itself, elsewhere a line for each change."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fpcn_dist.runtime.terminal import Terminal
from fpcn_dist.studies.search.records import TrialRecord

_BEST = 5
"""Ended trials that the table shows."""


class TrialTable:
    """What is shown of a search, between :meth:`start` and :meth:`stop`.

    Args:
        epochs: the epochs of a whole trial.
        console: where to draw; standard output by default.
    """

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        self._epochs = epochs
        self._console = console or Terminal(file=sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._states: dict[int, str] = {}

    def start(self) -> None:
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, record: TrialRecord) -> None:
        """Say a line where a trial has begun or ended and there is no table."""
        if self._live is None and self._states.get(record.number) != record.state:
            self._states[record.number] = record.state
            words = [f"trial {record.number}", record.state, *_standing(record), in_words(record.settings)]
            if record.reason:
                words.append(record.reason)
            self._console.print("  ".join(words))

    def refresh(self, records: Sequence[TrialRecord]) -> None:
        """Draw the running trials, and the best of those that have ended."""
        if self._live is None:
            return
        running = [record for record in records if record.state == "running"]
        ended = sorted(
            (record for record in records if record.state in ("finished", "stopped")),
            key=lambda record: -(record.accuracy or 0.0),
        )
        counts = {state: sum(r.state == state for r in records) for state in ("finished", "stopped", "failed")}
        title = ", ".join(f"{count} {state}" for state, count in counts.items())
        table = Table("trial", "state", "epoch", "accuracy", "settings", title=title, title_justify="left")
        for record in [*running, *ended[:_BEST]]:
            epoch = f"{record.epoch or 0:g} of {self._epochs}"
            table.add_row(str(record.number), record.state, epoch, percent(record.accuracy), in_words(record.settings))
        self._live.update(table, refresh=True)


def percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.1f} %"


def in_words(settings: Mapping[str, Any]) -> str:
    """Fields and values, without the sections."""
    return ", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in settings.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _standing(record: TrialRecord) -> list[str]:
    return [f"epoch {record.epoch:g}", f"accuracy {percent(record.accuracy)}"] if record.history else []
