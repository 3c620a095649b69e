"""Records of trials: what is best, what is kept, how they are shown."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.search.finish import importance
from fpcn_dist.studies.search.live import TrialTable
from fpcn_dist.studies.search.records import (
    RESULTS_FILE,
    RESULTS_TABLE,
    SearchResults,
    TrialRecord,
    load_results,
    save_results,
)


def trial(
    number: int, accuracy: float, state: str = "finished", latency: float | None = None, **settings
) -> TrialRecord:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return TrialRecord(number, named, 144, state, ((1.0, accuracy / 2), (4.0, accuracy)), latency, 12.34)


def results(*trials: TrialRecord) -> SearchResults:
    return SearchResults("teacher", ("accuracy",), 4, trials)


def test_the_best_has_run_to_its_end():
    found = results(trial(0, 0.8), trial(1, 0.95, "stopped"), trial(2, 0.9), trial(3, 0.9))
    assert found.best is not None and found.best.number == 2
    assert results(trial(0, 0.5, "stopped")).best is None


def test_pareto_front():
    found = results(
        trial(0, 0.9, latency=9.0),
        trial(1, 0.8, latency=3.0),
        trial(2, 0.7, latency=5.0),
        trial(3, 0.9, latency=8.0),
        trial(4, 0.99, "stopped", latency=1.0),
        trial(5, 0.8, latency=2.5),
    )
    assert [member.number for member in found.pareto] == [5, 3]


def test_results_are_read_back_and_the_table_holds_them(tmp_path):
    written = results(trial(0, 0.8, contrast__pairs="all"), trial(1, 0.5, "stopped", contrast__num_pairs=7, x='a,"b'))
    save_results(tmp_path, written)
    assert load_results(tmp_path) == written
    rows = list(csv.DictReader(io.StringIO((tmp_path / RESULTS_TABLE).read_text())))
    assert [row["accuracy"] for row in rows] == ["0.8", "0.5"]
    assert rows[1]["contrast.num_pairs"] == "7" and rows[1]["contrast.pairs"] == "" and rows[1]["x"] == 'a,"b'


def test_damaged_results_are_refused(tmp_path):
    assert load_results(tmp_path) is None
    (tmp_path / RESULTS_FILE).write_text('{"format": 1, "trials": [{}]')
    with pytest.raises(UserError, match=r"results\.json: is damaged"):
        load_results(tmp_path)


def test_importance_finds_the_field_that_matters():
    trials = [trial(n, 0.5 + 0.4 * (n % 10) / 10, a=float(n % 10), b=float(n * 7919 % 11)) for n in range(40)]
    found = importance(results(*trials))
    assert found["a"] > 3 * found["b"] and sum(found.values()) == pytest.approx(1)
    assert importance(results(*trials[:3])) == {}
    assert importance(results(*(trial(n, 0.5, a=1.0, kind="x" if n % 2 else "y") for n in range(8)))).keys() <= {"kind"}


def test_the_live_table_shows_the_running_and_the_best():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    table = TrialTable(4, console)
    table.start()
    ended = [trial(n, n / 10, contrast__center_weight=0.125) for n in range(8)]
    table.refresh([*ended, trial(8, 0.05, "running"), TrialRecord(9, {}, state="failed", reason="x")])
    table.stop()
    shown = console.file.getvalue()
    assert "8 finished" in shown and "1 failed" in shown and "running" in shown and "center_weight 0.125" in shown
    assert "70.0 %" in shown and "20.0 %" not in shown


def test_elsewhere_each_change_is_a_line():
    console = Console(file=io.StringIO(), width=500)
    table = TrialTable(4, console)
    table.start()
    for state in ("running", "running", "finished"):
        table.note(trial(3, 0.8, state))
    table.note(TrialRecord(4, {}, state="failed", reason="out of memory"))
    table.stop()
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3 and "trial 3  finished  epoch 4  accuracy 80.0 %" in lines[1] and "out of memory" in lines[2]
