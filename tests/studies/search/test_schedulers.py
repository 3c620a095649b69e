"""What the schedulers of a search are told: when trials may be ended, and how earlier ones did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from fpcn_dist.studies.search.records import TrialRecord
from fpcn_dist.studies.search.request import SearchRequest, make_plan
from fpcn_dist.studies.search.run_search import _remind, _tune_config
from tests.helpers.distilling import recipe


@pytest.mark.parametrize(
    ("epochs", "eval_every", "grace"), [(4, 1, 1), (60, 1, 7), (60, 5, 10), (4, 4, 4), (4, 8, 4), (1, 1, 1)]
)
@pytest.mark.parametrize("scheduler", ["asha", "pbt"])
def test_no_trial_is_judged_before_it_was_evaluated(
    tmp_path: Path, scheduler: str, epochs: int, eval_every: int, grace: int
) -> None:
    length = {"epochs": epochs, "eval_every": eval_every}
    space = {"optim.lr": {"low": 1e-4, "high": 1e-2}, "contrast.pairs": None, "contrast.num_pairs": None}
    chosen = recipe("contrast", train=length, search={"space": space})
    request = SearchRequest(chosen, "teacher", scheduler=scheduler)  # pyright: ignore[reportArgumentType]
    plan = make_plan(request, tmp_path, 3, [{"CPU": 1}])
    found = _tune_config(request, plan, 1, ()).scheduler
    first = found._perturbation_interval if scheduler == "pbt" else found._brackets[0]._rungs[-1][0]
    assert first == grace


def test_the_scheduler_judges_by_the_trials_of_earlier_starts() -> None:
    class Newcomer:
        trial_id = "newcomer"

    def verdict(records: list[TrialRecord]) -> str:
        goal: dict[str, Any] = {"time_attr": "epoch", "metric": "accuracy", "mode": "max"}
        scheduler = ASHAScheduler(**goal, max_t=9, grace_period=1, reduction_factor=3)
        _remind(scheduler, records)
        scheduler.on_trial_add(None, Newcomer())  # pyright: ignore
        return scheduler.on_trial_result(None, Newcomer(), {"epoch": 1.0, "accuracy": 0.3})  # pyright: ignore

    ended = [TrialRecord(n, {}, None, "stopped", ((1.0, 0.5 + n / 10),)) for n in range(4)]
    running = [TrialRecord(9, {}, None, "running", ((1.0, 0.9),))]
    assert verdict(running) == TrialScheduler.CONTINUE
    assert verdict(ended) == TrialScheduler.STOP
