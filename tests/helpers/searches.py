"""Searches made up for the tests of their report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from fpcn_dist.studies.search.records import SearchResults, TrialRecord

WEIGHT, PAIRS, NUM_PAIRS, LR = "contrast.center_weight", "contrast.pairs", "contrast.num_pairs", "optim.lr"


def trial(
    number: int,
    state: str,
    accuracies: Sequence[float],
    settings: dict[str, Any],
    pairs: int | None = 1024,
    **more: Any,
) -> TrialRecord:
    history = tuple((float(epoch), accuracy) for epoch, accuracy in enumerate(accuracies, start=1))
    return TrialRecord(number, settings, pairs, state, history, seconds=1234.4, **more)


def settings(weight: float, pairs: str, num_pairs: int | None = None, lr: float = 0.01) -> dict[str, Any]:
    return {WEIGHT: weight, PAIRS: pairs} | ({NUM_PAIRS: num_pairs} if num_pairs else {}) | {LR: lr}


def many(count: int) -> SearchResults:
    draw = random.Random(0)
    trials = []
    for number in range(count):
        state = draw.choice(["finished", "stopped", "stopped", "failed"])
        accuracies = sorted(draw.random() for _ in range(60 if state == "finished" else 20))
        pairs = draw.choice(["all", "random", "hardest"])
        num_pairs = None if pairs == "all" else draw.randint(32, 1024)
        chosen = settings(10 ** draw.uniform(-4, 1), pairs, num_pairs, draw.random())
        chosen |= {f"optim.field_with_a_long_name_{index}": draw.random() for index in range(4)}
        trials.append(trial(number, state, accuracies, chosen, num_pairs or 1024, latency=1 + draw.random()))
    return SearchResults(
        "teacher", ("accuracy", "latency"), 60, tuple(trials), (WEIGHT, NUM_PAIRS), {WEIGHT: 0.7, PAIRS: 0.2, LR: 0.1}
    )
