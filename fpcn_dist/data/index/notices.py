"""What is said about the images of a data folder: which were refused, what was left out, what looks wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fpcn_dist.runtime.names import printable

if TYPE_CHECKING:
    from rich.table import Table

    from fpcn_dist.data.index.check.images import Refused


class Notice(NamedTuple):
    """A sentence about the data that a user should know, and that stops nothing.

    Attributes:
        subject: what it is about, such as a folder or a suffix.
        text: what there is to say about it, without a full stop.
    """

    subject: str
    text: str


def refusal_table(refused: Sequence[Refused]) -> Table:
    """Which images were refused, and why, for the terminal."""
    return _table(f"{len(refused)} image(s) refused", "image", "why it was refused", refused)


def show_notices(refused: Sequence[Refused], notices: Sequence[Notice]) -> None:
    """Print which images were refused and what else there is to know; nothing is printed where all is well."""
    show_refused(refused)
    if notices:
        _print(notice_table(notices))


def show_refused(refused: Sequence[Refused]) -> None:
    """Print which images were refused, and why; nothing is printed where none was."""
    if refused:
        _print(refusal_table(refused))


def notice_table(notices: Sequence[Notice]) -> Table:
    """What there is to know about data, beside what was refused."""
    return _table("About the data", "what", "what there is to know", notices)


def _table(title: str, subject: str, text: str, rows: Iterable[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(subject, text, title=title)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _print(table: Table) -> None:
    from fpcn_dist.runtime.terminal import Terminal

    Terminal().print(table)
