"""The live view of a training on the first rank's terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from fpcn_dist.runtime.names import printable
from fpcn_dist.runtime.output import Outlived
from fpcn_dist.runtime.terminal import Terminal


class Progress:
    """Rank 0's live view of training: a bar on a terminal, one plain line per log point elsewhere.

    Use as a context manager around the loop.

    Args:
        total_steps: steps of the whole run.
        start_step: steps that were done before this process began; the estimate of the time left ignores them.
        rank: global rank; all but 0 stay silent.
        console: where to draw; standard output by default.
    """

    def __init__(self, total_steps: int, *, start_step: int = 0, rank: int = 0, console: Console | None = None) -> None:
        self._total_steps, self._start_step, self._silent = total_steps, start_step, rank != 0
        # A bar is for a terminal; the log gets lines, as a file does.
        stream, self._log = sys.stdout, None
        if console is None and isinstance(stream, Outlived) and stream.isatty():
            stream, self._log = stream.unlogged, stream.log
        self._console = console or Terminal(file=cast(TextIO, stream))
        self._bar = RichProgress(
            TextColumn("[bold]step[/] {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=self._silent or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step)
        self._stack = contextlib.ExitStack()
        self._start_time = time.monotonic()

    def __enter__(self) -> Progress:
        self._stack.enter_context(self._bar)
        if self._log is not None:  # the bar lets what is printed appear above it
            sys.stdout = cast(TextIO, Outlived(sys.stdout, self._log))
        self._start_time = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def advance(self, step: int) -> None:
        """Move the bar to ``step``; costs next to nothing, so call it each step."""
        self._bar.update(self._task, completed=step)

    def update(self, step: int, epoch: float, values: Mapping[str, float], *, name: str = "") -> None:
        """Show the numbers of a log point; ``loss``, ``accuracy`` and ``images_per_second`` are shown where given.

        ``name`` tells apart what is trained at the same time.
        """
        if self._silent:
            return
        parts = [f"epoch {epoch:.2f}", *self._numbers(values), f"ETA {self._eta(step)}"]
        status = "  ".join([printable(name), *parts] if name else parts)
        self._bar.update(self._task, completed=step, description=status)
        line = f"step {step}/{self._total_steps}  {status}"
        if self._bar.disable:
            self._console.print(line)
        elif self._log is not None:
            self._log.write(f"{line}\n")

    def print(self, message: str) -> None:
        """Print a line above the bar."""
        if self._silent:
            return
        self._console.print(printable(message))
        if self._log is not None:
            self._log.write(f"{printable(message)}\n")

    def _eta(self, step: int) -> str:
        done = step - self._start_step
        if done <= 0:
            return "-:--:--"
        seconds = round((time.monotonic() - self._start_time) / done * (self._total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    @staticmethod
    def _numbers(values: Mapping[str, float]) -> list[str]:
        shown = []
        if "loss" in values:
            shown.append(f"loss {values['loss']:.4f}")
        if "accuracy" in values:
            shown.append(f"accuracy {100 * values['accuracy']:.1f} %")
        if "images_per_second" in values:
            shown.append(f"{values['images_per_second']:.0f} images/s")
        return shown
