"""Checks and their findings: a check always finds something, whatever happens in it and however long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from fpcn_dist.runtime.errors import UserError

_THREAD = "doctor's check"


class Finding(NamedTuple):
    """A finding is one line of the report.

    Attributes:
        status: ``ok``, ``warning`` (works, but worse than it could) or ``problem`` (training would fail or be wrong).
        found: what was found, without a full stop.
        hint: what to do about it; empty where there is nothing to do.
        check: name of the check.
    """

    status: str
    found: str
    hint: str = ""
    check: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8}{self.check}: {self.found}" + (f"; {self.hint}" if self.hint else "")


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warning(found: str, hint: str) -> Finding:
    return Finding("warning", found, hint)


def problem(found: str, hint: str) -> Finding:
    return Finding("problem", found, hint)


def explained(error: UserError) -> Finding:
    """Turn a mistake that the library itself has explained into a problem."""
    value = "" if error.value is None else f" {error.value}"
    return problem(f"{error.field}{value}: {error.reason}", error.hint)


@dataclass(frozen=True)
class Check:
    """A check looks at one thing.

    Attributes:
        name: of the check in its lines.
        look: finds at least one thing.
        hint: what to do where it fails in a way that it does not explain itself.
        seconds: how long it may take.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    hint: str
    seconds: float = 30.0

    def run(self) -> list[Finding]:
        """Return what the check found. If it raises, or never ends, that is a problem; its thread is left behind."""
        found: list[Finding] = []
        thread = threading.Thread(target=self._look, args=[found], name=_THREAD, daemon=True)
        thread.start()
        thread.join(self.seconds)
        if thread.is_alive():
            found = [*found, problem(f"did not end within {self.seconds:g} s", self.hint)]
        return [finding._replace(check=self.name) for finding in found]

    def _look(self, found: list[Finding]) -> None:
        try:
            for finding in self.look():
                found.append(finding)  # one by one, so that it stays where the next raises
        except UserError as error:
            found.append(explained(error))
        except ImportError as error:
            found.append(problem(f"cannot be checked ({error})", self.hint))
        except Exception as error:  # whatever a broken installation may raise
            first_line = (str(error).strip() or "no message").splitlines()[0]
            found.append(problem(f"failed: {type(error).__name__}: {first_line}", self.hint))


def stuck() -> bool:
    """Tell whether a check that was given up is still under way."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
