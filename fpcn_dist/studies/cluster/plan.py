"""Which runs train where: packed into groups by the cost of their steps, groups given ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fpcn_dist.runtime.errors import UserError

_EXCHANGE = 0.1
"""Share of a step's time on one place that ranks spend on one another, as the plan assumes: it keeps runs on
places of their own where that is as good."""


@dataclass(frozen=True)
class Group:
    """Runs that train on the same batches, on the same ranks.

    Attributes:
        runs: their names.
        ranks: processes that share each batch, one on each place.
        seconds: the seconds of one step of all runs, estimated.
    """

    runs: tuple[str, ...]
    ranks: int
    seconds: float


def make_plan(costs: Mapping[str, float], slots: int, batch_size: int) -> list[Group]:
    """The groups, of any number, whose slowest step is the fastest; the slowest group first.

    For a number of groups, the costliest run is dealt out first, always to the group that has least to do; then each
    further place goes to the group whose step takes longest, as long as the batch divides by its ranks.

    Args:
        costs: seconds of a step on one place, by run.
        slots: places.
        batch_size: images of a global batch.

    Raises:
        UserError: there is no place at all.
    """
    if slots < 1:
        raise UserError("--gpus", slots, "the plan needs at least one place", "give 1 or more")
    plans = [_groups(costs, count, slots, batch_size) for count in range(1, min(slots, len(costs)) + 1)]
    return min(plans, key=lambda groups: groups[0].seconds)


def _groups(costs: Mapping[str, float], count: int, slots: int, batch_size: int) -> list[Group]:
    runs: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        min(runs, key=lambda group: sum(costs[n] for n in group)).append(name)
    work = [sum(costs[name] for name in group) for group in runs]
    ranks, left = [1] * count, slots - count
    while True:
        slowest = max(range(count), key=lambda i: _step_seconds(work[i], ranks[i]))
        more = _next_divisor(batch_size, ranks[slowest])
        # Places for any other group would not make the slowest step faster.
        if (
            more is None
            or more - ranks[slowest] > left
            or (_step_seconds(work[slowest], more) >= _step_seconds(work[slowest], ranks[slowest]))
        ):
            break
        left -= more - ranks[slowest]
        ranks[slowest] = more
    groups = [Group(tuple(g), r, _step_seconds(w, r)) for g, r, w in zip(runs, ranks, work, strict=True)]
    return sorted(groups, key=lambda group: -group.seconds)


def _step_seconds(work: float, ranks: int) -> float:
    return work if ranks == 1 else work * (1 / ranks + _EXCHANGE)


def _next_divisor(number: int, after: int) -> int | None:
    return next((n for n in range(after + 1, number + 1) if number % n == 0), None)
