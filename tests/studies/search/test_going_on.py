"""What a search that goes on makes of the trials of its earlier starts, by their records alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fpcn_dist.studies.search.plan import Plan
from fpcn_dist.studies.search.records import GIVEN_UP, SearchResults, TrialRecord, load_results, save_results
from fpcn_dist.studies.search.sampler import build_sampler
from tests.helpers.distilling import recipe

SPACE = {"contrast.pairs": None, "contrast.num_pairs": None, "model.dropout": {"low": 0.1, "high": 0.5, "also": [0.0]}}


def _plan(folder: Path, **more: Any) -> Plan:
    teacher = recipe("contrast", search={"space": SPACE})
    given: dict[str, Any] = {"stage": "teacher", "teacher": teacher, "student": None, "students": ()}
    return Plan(**given | {"output": folder, "classes": 3, "workers": 1, "latency": False, "population": False} | more)


def _record(config: dict[str, Any], state: str, *accuracies: float, reason: str | None = None) -> TrialRecord:
    history = tuple((float(epoch), accuracy) for epoch, accuracy in enumerate(accuracies, 1))
    return TrialRecord(config["number"], config["settings"], None, state, history, None, 1.0, reason, config["drawn"])


@pytest.fixture
def before(tmp_path: Path) -> list[TrialRecord]:
    """Records of a search that was killed, as they are read from its folder."""
    sampler = build_sampler(_plan(tmp_path), trials=12, trials_per_teacher=1, seed=0)
    configs: list[Any] = [sampler.suggest(f"t{index}") for index in range(6)]
    records = [_record(config, "finished", 0.2, 0.5 + config["number"] / 100) for config in configs[:3]]
    records.append(_record(configs[3], "running", 0.4))
    records.append(_record(configs[4], "failed", reason="out of memory"))
    records.append(_record(configs[5], "failed", 0.3, reason=f"{GIVEN_UP}the node died"))
    save_results(tmp_path, SearchResults("teacher", ("accuracy",), 2, tuple(records)))
    results = load_results(tmp_path)
    assert results is not None
    return list(results.trials)


def test_the_sampler_knows_what_has_ended_and_begins_with_what_has_not(
    tmp_path: Path, before: list[TrialRecord]
) -> None:
    sampler = build_sampler(_plan(tmp_path), trials=12, trials_per_teacher=1, seed=0, before=before)
    known = sampler._ot_study.trials
    assert [trial.values for trial in known] == [[0.5], [0.51], [0.52], [0.0]]
    assert [trial.params for trial in known] == [before[index].drawn for index in (0, 1, 2, 4)]
    configs: list[Any] = [sampler.suggest(f"new{index}") for index in range(4)]
    for config, record in zip(configs, (before[3], before[5]), strict=False):
        assert (config["number"], config["settings"], config["drawn"]) == (record.number, record.settings, record.drawn)
    assert [config["number"] for config in configs[2:]] == [6, 7]
    later = build_sampler(_plan(tmp_path), trials=12, trials_per_teacher=1, seed=0, before=[*before[:1], *before[3:]])
    configs: list[Any] = [later.suggest(f"new{index}") for index in range(5)]
    assert [config["number"] for config in configs] == [3, 5, 1, 2, 6]  # without holes
    drawn = [json.dumps(record.drawn, sort_keys=True) for record in before]
    assert not {json.dumps(config["drawn"], sort_keys=True) for config in configs[2:]} & set(drawn)


def test_a_failed_trial_is_the_worst_in_each_objective(tmp_path: Path, before: list[TrialRecord]) -> None:
    plan = _plan(tmp_path, latency=True)
    sampler = build_sampler(plan, trials=12, trials_per_teacher=1, seed=0, before=before)
    assert [trial.values for trial in sampler._ot_study.trials][-1] == [0.0, float("inf")]


def test_records_of_older_files_cost_only_what_the_sampler_had_learnt(
    tmp_path: Path, before: list[TrialRecord]
) -> None:
    values = json.loads((tmp_path / "results.json").read_text())
    for trial in values["trials"]:
        del trial["drawn"]
    (tmp_path / "results.json").write_text(json.dumps(values))
    results = load_results(tmp_path)
    assert results is not None
    sampler = build_sampler(_plan(tmp_path), trials=12, trials_per_teacher=1, seed=0, before=results.trials)
    assert not sampler._ot_study.trials
    configs: list[Any] = [sampler.suggest(f"new{index}") for index in range(3)]
    assert [config["number"] for config in configs] == [3, 5, 6]
