"""One table of all runs while they train, read from their run folders, wherever they run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fpcn_dist.runs.metrics import Standing, read_standing
from fpcn_dist.runtime.terminal import Terminal


class LiveTable:
    """On a terminal a table that renews itself, elsewhere a line whenever a run changes its state or ends an epoch.

    Args:
        output: folder of the run folders.
        names: the runs.
        console: where to draw; standard output by default.
    """

    def __init__(self, output: Path, names: Sequence[str], console: Console | None = None) -> None:
        self._output, self._states = output, dict.fromkeys(names, "")
        self._console = console or Terminal(file=sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._said: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        if self._live is not None:
            self._live.stop()

    def set_states(self, names: Sequence[str], state: str) -> None:
        """Note what becomes of some runs."""
        self._states |= dict.fromkeys(names, state)

    def refresh(self) -> None:
        """Show how all runs stand now."""
        standings = {name: read_standing(self._output / name) for name in self._states}
        if self._live is not None:
            self._live.update(self._table(standings), refresh=True)
            return
        for name, standing in standings.items():
            state, epoch = self._states[name], int(standing.epoch or 0)
            if self._said.get(name) != (state, epoch):
                self._said[name] = (state, epoch)
                self._console.print("  ".join([name, *_cells(standing), state]))

    def _table(self, standings: dict[str, Standing]) -> Table:
        table = Table("run", "step", "loss", "accuracy", "images/s", "state")
        for name, standing in standings.items():
            table.add_row(name, *_numbers(standing), self._states[name])
        return table


def _numbers(standing: Standing) -> list[str]:
    step, _, loss, accuracy, speed = standing
    return [
        "-" if step is None else str(step),
        "-" if loss is None else f"{loss:.4f}",
        "-" if accuracy is None else f"{100 * accuracy:.1f} %",
        "-" if speed is None else f"{speed:.0f}",
    ]


def _cells(standing: Standing) -> list[str]:
    titles = "step", "loss", "accuracy", "images/s"
    return [f"{title} {value}" for title, value in zip(titles, _numbers(standing), strict=True)]
