"""How a group of runs ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.cluster.errors import last_line
from fpcn_dist.studies.cluster.groups import GroupResult, RunningGroup


class TaskError(Exception):
    """As Ray wraps what a remote function raises."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Other(Exception):
    """Never raised here."""


def result_of(cause: Exception) -> GroupResult:
    """How a group ends whose first rank raises ``cause``."""

    def get(tasks: list[Any], timeout: float | None = None) -> None:
        raise TaskError(cause)

    group = RunningGroup.__new__(RunningGroup)
    errors = SimpleNamespace(RayTaskError=TaskError, GetTimeoutError=Other, RayError=Other)
    group._ray = SimpleNamespace(wait=lambda tasks, **_: (tasks, []), get=get, exceptions=errors)
    group.tasks = ["task"]
    return group.result()


@pytest.mark.parametrize(
    ("cause", "result"),
    [
        (MemoryError(), GroupResult("MemoryError", for_good=False)),
        (AssertionError(), GroupResult("AssertionError", for_good=False)),
        (RuntimeError("a trace\nthe reason\n"), GroupResult("the reason", for_good=False)),
        (UserError("data", 1, "is wrong", "mend it"), GroupResult("data 1: is wrong; mend it", for_good=True)),
    ],
)
def test_a_group_tells_why_it_ended(cause, result):
    assert result_of(cause) == result


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_error_without_a_message_is_called_by_its_type(empty):
    assert last_line(ValueError(empty)) == "ValueError"
