"""What the recorder makes of what Tune tells it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fpcn_dist.studies.search.plan import Plan
from fpcn_dist.studies.search.recorder import Recorder
from fpcn_dist.studies.search.records import load_results
from tests.helpers.distilling import recipe


def test_a_trial_that_dies_without_a_word_is_given_up_by_name(tmp_path):
    plan = Plan(
        stage="teacher",
        teacher=recipe("contrast"),
        student=None,
        students=(),
        output=tmp_path,
        classes=3,
        workers=1,
        latency=False,
        population=False,
    )
    recorder = Recorder(plan)
    config = {"number": 0, "settings": {"contrast.pairs": "all"}}
    trial: Any = SimpleNamespace(config=config, trial_id="a_0", get_pickled_error=MemoryError, get_error=lambda: None)
    recorder.on_trial_error(0, [trial], trial)
    results = load_results(tmp_path)
    assert results is not None
    assert [(record.state, record.reason) for record in results.trials] == [("failed", "given up: MemoryError")]
