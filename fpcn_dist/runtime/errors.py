"""The one exception that a user may see: what is wrong, where, why, and what to do about it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

from fpcn_dist.runtime.names import printable


class UserError(Exception):
    """A mistake or a fault outside the program, explained.

    Every entry script prints it as one line and leaves with exit status 2, without a traceback.

    Args:
        field: what is wrong: a recipe field (``data.crop``), an argument (``--data``), a file, a rank.
        value: the offending value as the user wrote it, or ``None`` where there is none to show.
        reason: why it cannot be used, as a sentence without a full stop.
        hint: what to do about it, as an imperative without a full stop.
    """

    def __init__(self, field: str, value: object, reason: str, hint: str) -> None:
        self.field, self.value, self.reason, self.hint = field, value, reason, hint
        shown = "" if value is None else f" {value!s}"
        super().__init__(printable(f"{field}{shown}: {reason}; {hint}"))

    def __reduce__(self):
        return type(self), (self.field, self.value, self.reason, self.hint)


class Outage(UserError):
    """A disk, the network or another rank failed: the same again may go well."""


class NotFinite(UserError):
    """A loss or a gradient ran away; every rank finds that out at the same time."""


class Preempted(Exception):
    """A run has stopped because it was told to; what it has done so far is on the disk.

    Args:
        signal: name of the signal that told it.
        when: how far it had come, such as "after step 3, with a checkpoint".
        again: how to go on.

    Attributes:
        signal, when: the first two arguments.
        status: exit status: 75, EX_TEMPFAIL; but 0 under torchrun, which starts all ranks again for any other.
    """

    def __init__(self, signal: str, when: str, again: str = "the same command goes on from there") -> None:
        self.signal, self.when = signal, when
        self.status = 0 if "TORCHELASTIC_RUN_ID" in os.environ else 75
        super().__init__(f"stopped by {signal} {when}; {again}")


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``-style help: the known word nearest to ``word``, or all of them where none is near."""
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose one of " + ", ".join(sorted(known))
