"""A terminal that shows text as it is: names of files and classes are no markup, no emoji codes and no orders to it."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console
from rich.text import Text

from fpcn_dist.runtime.names import printable_lines

_IN_FILES = 10_000
"""Columns of a table that goes into a file or a pipe: there a path is searched for, and must not be folded."""


class Terminal(Console):
    """A console for lines and tables, whose cells and titles may hold any name.

    Args:
        file: where to write; standard output by default.
        **options: of :class:`rich.console.Console`.
    """

    def __init__(self, file: IO[str] | None = None, **options: Any) -> None:
        plain = {"soft_wrap": True, "markup": False, "emoji": False, "highlight": False}
        super().__init__(file=file, **{**plain, **options})
        if "width" not in options and not self.is_terminal and not self.is_jupyter:
            self.width = _IN_FILES

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable_lines(text), **options)
