"""Results of a reproduction: their arithmetic, and their CSV, Markdown and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.reproduce.tables import (
    CAVEAT,
    ReproductionResults,
    Row,
    RunRecord,
    Score,
    Table,
    to_csv,
    to_markdown,
)
from tests.helpers.reproduction import HOSTILE, LOST, REASON, fabricate


@pytest.fixture
def results(tmp_path: Path) -> ReproductionResults:
    return fabricate(tmp_path)


def _table(results: ReproductionResults, key: str) -> Table:
    return next(table for table in results.tables if table.key == key)


def _named(table: Table, name: str) -> Row:
    return next(row for row in table.rows if row.name == name)


def _cells(line: str) -> list[str]:
    """Of a line of a Markdown table; a bar after a backslash is text."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize(
    ("paper", "ours", "mean", "spread", "difference"),
    [
        (93.1, (91.0, 92.0, 96.0), 93.0, 7**0.5, -0.1),
        (93.1, (94.6,), 94.6, None, 1.5),
        (93.1, (), None, None, None),
        (None, (90.0, 90.0), 90.0, 0.0, None),
        (0.0, (1.0,), 1.0, None, 1.0),
    ],
)
def test_score(
    paper: float | None, ours: tuple[float, ...], mean: float | None, spread: float | None, difference: float | None
) -> None:
    score = Score(paper, ours)
    for value, expected in ((score.mean, mean), (score.spread, spread), (score.difference, difference)):
        assert value is None if expected is None else value == pytest.approx(expected)


def test_seeds_are_those_that_have_a_result(results: ReproductionResults) -> None:
    table = _table(results, "table2")
    assert [_named(table, name).seeds for name in ("FPCN", "PCA-Net", "MMAL-Net")] == [3, 2, 0]


def test_rows_that_share_a_name_are_told_apart_where_other_runs_computed_them(results: ReproductionResults) -> None:
    pairs, areas = _table(results, "figure3"), _table(results, "figure4")
    assert pairs.label(pairs.rows[0]) == "FPCN, pairs in a batch 28"
    assert [label for label, _ in areas.computations()] == ["with alpha", "without alpha"]
    assert [len(runs) for _, runs in areas.computations()] == [3, 3]
    assert len(pairs.computations()) == 12
    labels = [label for label, _ in _table(results, "table2").computations()]
    assert "FPCN" in labels and "MMAL-Net" not in labels  # which has no runs


def test_figures_have_no_column_of_the_paper(results: ReproductionResults) -> None:
    assert _table(results, "table4").columns(0) == ("paper", "ours", "difference", "spread")
    assert _table(results, "figure4").columns(0) == ("ours", "spread")


def test_csv_has_a_line_for_each_score(results: ReproductionResults) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(results))))
    assert len(lines) == sum(len(table.rows) * len(table.scores) for table in results.tables)
    (line,) = [line for line in lines if (line["table"], line["name"], line["score"][:4]) == ("table2", "FPCN", "test")]
    assert line["details"] == "backbone: ResNet-101" and line["seeds"] == "3"
    assert float(line["paper"]) == 93.1 and float(line["ours"]) == pytest.approx(91.6667, abs=1e-4)
    assert float(line["difference"]) == pytest.approx(-1.4333, abs=1e-4)
    assert float(line["spread"]) == pytest.approx(0.6028, abs=1e-4)
    assert line["values"] == "91.1; 92.3; 91.6" and line["commits"] == "9c110457"
    assert line["commands"].count("python launch/train.py") == 3 and "--seed 2" in line["commands"]
    (line,) = [line for line in lines if line["name"] == "MMAL-Net" and line["score"].startswith("test")]
    assert line["ours"] == line["difference"] == line["spread"] == line["commands"] == "" and line["seeds"] == "0"
    assert line["reason"] == LOST and line["paper"] == "91.9"


def test_csv_quotes_what_a_name_may_hold(results: ReproductionResults) -> None:
    table = _table(results, "table3")
    name = f'{HOSTILE}, "two"\nlines'
    changed = dataclasses.replace(table, rows=(dataclasses.replace(table.rows[0], name=name),))
    (line,) = csv.DictReader(io.StringIO(to_csv(dataclasses.replace(results, tables=(changed,)))))
    assert line["name"] == name and line["paper"] == "92.0"


def test_markdown_tables(results: ReproductionResults) -> None:
    text = to_markdown(results)
    lines = text.splitlines()
    assert CAVEAT in text and "scale tiny, 3 seed(s)" in text and "1,953 test images" in text
    start = lines.index("## Table 2: systems") + 2
    assert _cells(lines[start]) == [
        "system",
        "backbone",
        "training accuracy, %: paper",
        "ours",
        "difference",
        "spread",
        "test accuracy, %: paper",
        "ours",
        "difference",
        "spread",
        "seeds",
    ]
    rows = {cells[0]: cells[1:] for cells in map(_cells, lines[start + 2 : start + 11])}
    assert rows["FPCN"] == ["ResNet-101", "99.8", "96.7", "-3.1", "0.6", "93.1", "91.7", "-1.4", "0.6", "3"]
    assert rows["MMAL-Net"] == ["ResNet-50", "99.7", "-", "-", "-", "91.9", "-", "-", "-", "0"]
    assert f"- PCA-Net: {REASON}" in lines and f"- MMAL-Net: {LOST}" in lines
    start = lines.index("## Figure 3: pairs in a batch") + 2
    assert _cells(lines[start]) == ["system", "pairs in a batch", "test accuracy, %: ours", "spread", "seeds"]
    assert _cells(lines[start + 2])[:2] == ["FPCN", "28"]


def test_markdown_tables_are_rectangular(results: ReproductionResults) -> None:
    counts = [len(_cells(line)) for line in to_markdown(results).splitlines() if line.startswith("|")]
    widths = [11, 9, 16, 5, 6]
    expected = [w for w, table in zip(widths, results.tables, strict=True) for _ in range(len(table.rows) + 2)]
    assert counts == expected


def test_every_row_has_its_commands_in_markdown(results: ReproductionResults) -> None:
    text = to_markdown(results)
    for table in results.tables:
        for row in table.rows:
            for run in row.runs:
                where = "(commit 9c110457, NVIDIA H100 80GB HBM3)"
                assert f"- {table.label(row)}, seed {run.seed}: `{run.command}` {where}\n" in text


def test_markdown_shows_names_as_they_are(results: ReproductionResults) -> None:
    table = _table(results, "table3")
    run = RunRecord("runs/x", 0, "python a ``b`` | c", HOSTILE, "_d_")
    row = dataclasses.replace(table.rows[0], name=f"{HOSTILE}\n\\|", reason="<u>\n# x", runs=(run,))
    text = to_markdown(dataclasses.replace(results, tables=(dataclasses.replace(table, rows=(row,)),)))
    escaped = r"\<script\>alert('1')\</script\> \& {{ 7 * 7 }} $x^2$ \| \`a\` \*b\*".replace("7 * 7", r"7 \* 7")
    (line,) = [line for line in text.splitlines() if line.startswith(r"| \<script")]
    assert line.startswith(rf"| {escaped} \\\| | ✓ |")
    assert r"\<u\> # x" in text and "```python" not in text
    assert "``` python a ``b`` | c ```" in text and r"\_d\_" in text
    assert "\n# x" not in text and "<script" not in re.sub(r"\\<", "", text)


def test_saved_files(results: ReproductionResults, tmp_path: Path) -> None:
    results.save(tmp_path)
    values = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert values["fpcn_dist_version"] and values["seeds"] == [0, 1, 2]
    assert values["tables"][0]["rows"][-1]["scores"][1] == {"paper": 93.1, "ours": [91.1, 92.3, 91.6]}
    assert values["comparisons"][0]["heatmaps"][1]["title"] == "FPCN"
    assert (tmp_path / "results.csv").read_text(encoding="utf-8") == to_csv(results)
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == to_markdown(results)


def test_a_folder_that_is_not_there_is_named(results: ReproductionResults, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/results\.json: could not be written"):
        results.save(tmp_path / "absent")
