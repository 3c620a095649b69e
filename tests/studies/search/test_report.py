"""The report of a search: complete, self-contained, harmless whatever the names, from no trial up to hundreds."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fpcn_dist.studies.search import figures
from fpcn_dist.studies.search.records import SearchResults, TrialRecord
from fpcn_dist.studies.search.report import build_search_report
from tests.helpers import browser
from tests.helpers.chart import Chart
from tests.helpers.searches import LR, NUM_PAIRS, PAIRS, WEIGHT, many, settings, trial
from tests.runs.report.test_run import Page

needs_browser = pytest.mark.skipif(browser.BINARY is None, reason=browser.MISSING)

HOSTILE = "<script>alert('1')</script> & {{ 7 * 7 }} $x^2$"
PAIRS_CHART, PROGRESS, IMPORTANCE, LATENCY = (
    "pairs per batch",
    "Early stopping",
    "Importance",
    "Accuracy against latency",
)


@pytest.fixture
def results() -> SearchResults:
    """Trial 2 is the best; trial 3 is the fastest; trial 5 was as good once, but has been stopped."""
    trials = (
        trial(0, "finished", (0.5, 0.8, 0.8, 0.85), settings(0.001, "all"), latency=9.0),
        trial(1, "stopped", (0.41, 0.52), settings(1.0, "all", lr=0.3), latency=9.5),
        trial(2, "finished", (0.6, 0.85, 0.9, 0.931), settings(0.1, "hardest", 128), 128, latency=8.0),
        trial(3, "finished", (0.5, 0.6, 0.7, 0.744), settings(0.0, "random", 50), 50, latency=3.25),
        trial(4, "failed", (), settings(10.0, "random", 60), 60, reason="no memory: <u>lower</u> data.crop"),
        trial(5, "stopped", (0.94,), settings(0.01, "hardest", 64), 64, latency=3.0),
    )
    importance = {LR: 0.1, WEIGHT: 0.65, PAIRS: 0.25}
    return SearchResults("teacher", ("accuracy", "latency"), 4, trials, (WEIGHT, NUM_PAIRS), importance)


@pytest.fixture
def joint(results: SearchResults) -> SearchResults:
    """The same search with students."""
    trials = tuple(
        dataclasses.replace(
            trial,
            settings={f"teacher.{name}": value for name, value in trial.settings.items()}
            | {"student.distill.temperature": 2.0 + trial.number, "student.model.backbone": "resnet18"},
        )
        for trial in results.trials
    )
    fields = tuple(f"teacher.{name}" for name in results.log_fields)
    importance = {"teacher." + name: share for name, share in results.importance.items()}
    return dataclasses.replace(results, stage="joint", trials=trials, log_fields=fields, importance=importance)


def _page(output: Path, results: SearchResults) -> Page:
    output.mkdir(exist_ok=True)
    path = build_search_report(output, results, title="rocks")
    assert path == output / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def _text(page: Page) -> str:
    return " ".join(page.text.split())


def _headings(page: Page) -> list[str]:
    return re.findall(r"<h[23]>(.*?)</h[23]>", page.html)


def _rows(page: Page, heading: str) -> list[list[str]]:
    """Texts of the cells of the table under a heading."""
    table = page.html.split(f"<h2>{heading}</h2>")[1].split("<tbody>")[1].split("</tbody>")[0]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("</tr>")[:-1]]
    return [[" ".join(re.sub(r"<[^>]*>", "", cell).split()) for cell in row] for row in cells]


def test_everything_is_told(tmp_path: Path, results: SearchResults) -> None:
    page = _page(tmp_path / "my search", results)
    text = _text(page)
    assert "93.1 %" in text and "trial 2, validation images" in text
    assert "3.25 ms" in text and "trial 3, 74.4 %" in text  # trial 5 is faster, but has not finished
    assert "3 finished, 2 stopped early, 1 failed" in text and "of a whole trial" in text
    settings = [[f"lambda ({WEIGHT})", "0.1"], [PAIRS, "hardest"], [NUM_PAIRS, "128"], [LR, "0.01"]]
    assert _rows(page, "What the best trial used") == settings
    assert (
        f"launch/train.py --recipe '{tmp_path}/my search/best.yaml' --data DIR" in text and "best-teacher" not in text
    )
    assert [name for name in _headings(page) if name[0].isupper()] == [
        "What the best trial used",
        "Accuracy against what was searched",
        PROGRESS,
        IMPORTANCE,
        LATENCY,
        "Failed trials",
        "All trials",
    ]
    for words in ("on the validation images, at the best epoch so far", "had fewer epochs", "PED-ANOVA", "Figure 3"):
        assert words in text, words
    assert _rows(page, "Failed trials") == [["4", "no memory: &lt;u&gt;lower&lt;/u&gt; data.crop"]]


def test_all_trials_are_listed_best_first(tmp_path: Path, results: SearchResults) -> None:
    page = _page(tmp_path, results)
    rows = _rows(page, "All trials")
    assert [row[0] for row in rows] == ["2", "0", "3", "5", "1", "4"]
    assert rows[0] == ["2", "finished", "93.1", "4", "128", "8", "0.1", "hardest", "0.01", "128", "1,234"]
    assert rows[4] == ["1", "stopped early", "52.0", "2", "1,024", "9.5", "1", "all", "0.3", "-", "1,234"]
    assert rows[5][:6] == ["4", "failed", "-", "-", "60", "-"]
    columns = page.html.split("<h2>All trials</h2>")[1].split("</thead>")[0]
    assert columns.count("<th ") == len(rows[0]) and "ms</th>" in columns
    page = _page(tmp_path, dataclasses.replace(results, objectives=("accuracy",)))
    assert "ms</th>" not in page.html.split("<h2>All trials</h2>")[1]


def test_runs_that_have_a_report_are_linked(tmp_path: Path, results: SearchResults) -> None:
    reports = ["00002/report.html", "00002/student 1/report.html", "00003/resnet18/report.html"]
    for report in (*reports, "00003/resnet18/too/deep/report.html", "00009/report.html"):
        (tmp_path / "trials" / report).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "trials" / report).write_text("<!doctype html>")
    page = _page(tmp_path, results)
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert set(links) == {f"trials/{report}".replace(" ", "%20") for report in reports}
    best = page.html.split("What the best trial used")[1].split("</section>")[0]
    assert best.count("<a href") == 2
    assert _rows(page, "All trials")[0][0] == "2 student 1" and _rows(page, "All trials")[2][0] == "3 resnet18"


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"pairs": None}, PAIRS_CHART),
        ({"latency": None}, LATENCY),
        ({"history": ()}, PROGRESS),
        ({"history": ()}, LR),
        ({"settings": {WEIGHT: 1.0}}, LR),
        ({"state": "stopped"}, "What the best trial used"),
        ({"state": "finished"}, "Failed trials"),
        ({"importance": {}}, IMPORTANCE),
    ],
)
def test_only_what_there_is_gets_a_chart(
    tmp_path: Path, results: SearchResults, change: dict[str, Any], absent: str
) -> None:
    assert absent in _headings(_page(tmp_path, results))
    if "importance" in change:
        changed = dataclasses.replace(results, **change)
    else:
        changed = dataclasses.replace(results, trials=tuple(dataclasses.replace(t, **change) for t in results.trials))
    page = _page(tmp_path, changed)
    assert absent not in _headings(page) and "All trials" in _headings(page)


def test_each_field_has_the_chart_of_its_kind(tmp_path: Path, results: SearchResults) -> None:
    page = _page(tmp_path, results)
    small = [name for name in _headings(page) if name[0].islower()]
    assert small == [PAIRS_CHART, f"lambda ({WEIGHT})", PAIRS, LR]  # the number of pairs is in the first one
    assert page.tags.count("svg") == len(small) + 3
    without = tuple(dataclasses.replace(trial, pairs=None) for trial in results.trials)
    assert NUM_PAIRS in _headings(_page(tmp_path, dataclasses.replace(results, trials=without)))


def test_pairs_are_marked_by_kind_and_state(results: SearchResults) -> None:
    chart = Chart(figures.draw_pairs(results, "pairs"))
    assert {"all", "random", "hardest", "stopped early", "best trial", "pairs per batch"} <= set(chart.names)
    marks = sorted(chart.marks)
    assert [colour for _, _, colour, _ in marks] == [2, 3, 3, 1, 1]  # by pairs: 50, 64, 128, 1024, 1024
    assert [filled for _, _, _, filled in marks[:3]] == [True, False, True]
    assert {filled for _, _, _, filled in marks[3:]} == {True, False}
    assert chart.rings == 1
    assert marks[2][0] - marks[1][0] == pytest.approx((marks[3][0] - marks[1][0]) / 4, abs=0.01)  # 64, 128, 1024
    worst, stopped, best = (y for _, y, _, _ in marks[:3])
    assert stopped < best < worst  # the page's y axis points down


def test_pairs_that_were_not_varied_are_one_kind(results: SearchResults) -> None:
    trials = tuple(dataclasses.replace(trial, settings={LR: 0.1}) for trial in results.trials)
    chart = Chart(figures.draw_pairs(dataclasses.replace(results, trials=trials), "pairs"))
    assert {colour for _, _, colour, _ in chart.marks} == {1} and "finished" in chart.names


def test_zero_has_its_own_place_on_a_logarithmic_axis(tmp_path: Path, results: SearchResults) -> None:
    chart = Chart(figures.draw_numbers(results, WEIGHT, "field"))
    zero, *places = sorted(x for x, *_ in chart.marks)
    assert len(places) == 4  # 0.001, 0.01, 0.1, 1
    steps = [right - left for left, right in pairwise(places)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.01)
    assert zero < places[0] - 0.3 * steps[0]
    ticks = dict(chart.texts)
    assert ticks["0"] == pytest.approx(zero, abs=0.01)
    for name, place in zip(("0.001", "0.01", "0.1", "1"), places, strict=True):
        assert ticks[name] == pytest.approx(place, abs=0.01)
    (apart,) = [x for _, _, dashed, x in chart.lines if dashed]
    assert zero < apart < places[0]
    assert "but for an exact 0" in _text(_page(tmp_path, results))

    trials = tuple(trial for trial in results.trials if trial.settings[WEIGHT])
    results = dataclasses.replace(results, trials=trials)
    chart = Chart(figures.draw_numbers(results, WEIGHT, "field"))
    assert "0" not in chart.names and not chart.lines
    assert "but for an exact 0" not in _text(_page(tmp_path, results))


def test_a_linear_axis_stays_linear(results: SearchResults) -> None:
    trials = [trial(n, "finished", (0.5,), {LR: lr}) for n, lr in enumerate((0.0, 1.0, 3.0))]
    places = sorted(x for x, *_ in Chart(figures.draw_numbers(_of(results, trials), LR, "field")).marks)
    assert places[2] - places[1] == pytest.approx(2 * (places[1] - places[0]), abs=0.01)


def _of(results: SearchResults, trials: Sequence[TrialRecord]) -> SearchResults:
    return dataclasses.replace(results, trials=tuple(trials))


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.5, 0.5), (1e-9, 1e5), (0.02, 0.021), (3, 12), (0, 64), (-1.0, 0.1)])
def test_any_numbers_make_an_axis_with_apart_ticks(results: SearchResults, values: tuple[float, float]) -> None:
    trials = [trial(n, "finished", (0.5,), {WEIGHT: value}) for n, value in enumerate(values)]
    chart = Chart(figures.draw_numbers(_of(results, trials), WEIGHT, "field"))
    assert len(chart.marks) == 2 and all(math.isfinite(x) for x, *_ in chart.marks)
    label = chart.names.index(f"lambda ({WEIGHT})")
    ticks = sorted(chart.texts[:label], key=lambda tick: tick[1])
    assert ticks
    for (left, x), (right, after) in pairwise(ticks):
        assert after - x > 3.2 * (len(left) + len(right)), (left, right)  # digits are 6.4 wide


def test_choices_have_rows(results: SearchResults) -> None:
    chart = Chart(figures.draw_choices(results, PAIRS, "field"))
    assert {"all", "hardest", "random", "accuracy, %"} <= set(chart.names)
    rows = sorted(y for _, y, _, _ in chart.marks)
    gaps = sorted(after - before for before, after in pairwise(rows))
    assert len(rows) == 5 and gaps[1] < gaps[2]  # 2 of all, 2 of hardest, 1 of random
    mixed = [trial(n, "finished", (0.5,), {"x.y": value}) for n, value in enumerate((None, True, "a", 3, [1, 2]))]
    names = Chart(figures.draw_choices(_of(results, mixed), "x.y", "field")).names
    assert names[names.index("accuracy, %") + 1 :][:5] == ["null", "true", "a", "3", "[1, 2]"]


def test_importance_is_written_longest_first(results: SearchResults) -> None:
    names = Chart(figures.draw_importance(results, "importance")).names
    assert [name for name in names if "%" in name] == ["65 %", "25 %", "10 %"]
    assert [name for name in names if "%" not in name] == [f"lambda ({WEIGHT})", PAIRS, LR]


def test_progress_has_a_line_for_each_trial(results: SearchResults) -> None:
    chart = Chart(figures.draw_progress(results, "progress"))
    assert sorted(colour for colour, *_ in chart.lines) == [1, 1, 2, 5, 5]
    ends = {colour: [(x, y) for x, y, other, _ in chart.marks if other == colour] for colour in (1, 2, 5)}
    assert [len(ends[colour]) for colour in (1, 2, 5)] == [2, 1, 2]
    assert max(x for x, _ in ends[5]) < ends[2][0][0] == ends[1][0][0]
    assert {"stopped early", "finished", "best trial"} <= set(chart.names) and "running" not in chart.names
    running = [dataclasses.replace(trial, state="running") for trial in results.trials]
    chart = Chart(figures.draw_progress(_of(results, running), "progress"))
    assert {colour for colour, *_ in chart.lines} == {3} and "running" in chart.names


def test_progress_rises_where_the_accuracy_did(results: SearchResults) -> None:
    one = trial(0, "stopped", (0.5, 0.5, 0.7, 0.7), {LR: 0.1})
    svg = figures.draw_progress(_of(results, [one]), "progress")
    (path,) = re.findall(r'd="([^"]*)"[^>]*style="fill: none; stroke: var\(--series-5\)[^"]*"/>\s*</g>\s*<g', svg)
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", path) if point.strip()]
    rise = [x for (x, y), (_, after) in pairwise(points) if y != after]
    (end, *_), *_ = Chart(svg).marks
    assert len(rise) == 1 and points[0][0] < rise[0] < points[-1][0] == end
    assert rise[0] - points[0][0] == pytest.approx(2 * (end - rise[0]), abs=0.01)  # at epoch 3, the last one is 4


def test_the_pareto_front_is_joined_named_and_listed(tmp_path: Path, results: SearchResults) -> None:
    chart = Chart(figures.draw_pareto(results, "pareto"))
    assert [(colour, points) for colour, points, *_ in chart.lines] == [(2, 2)]
    assert len(chart.marks) == 5 and chart.rings == 1
    after = chart.names[chart.names.index("accuracy, %") + 1 :]
    assert {"2", "3"} <= set(after) and not {"0", "1", "5"} & set(after)
    assert _rows(_page(tmp_path, results), LATENCY) == [["3", "74.4", "3.25", "4"], ["2", "93.1", "8", "4"]]


def test_joint_search(tmp_path: Path, joint: SearchResults) -> None:
    page = _page(tmp_path, joint)
    text = _text(page)
    assert "search of teacher and student" in text and "DIR; best-teacher.yaml is that of its teacher" in text
    assert _rows(page, "What the best trial used")[0] == ["lambda (teacher.contrast.center_weight)", "0.1"]
    assert [name for name in _headings(page) if name[0].islower() or name[0] == "T"] == [
        PAIRS_CHART,
        "lambda (teacher.contrast.center_weight)",
        "teacher.contrast.pairs",
        "teacher.optim.lr",
        "T (student.distill.temperature)",
        "student.model.backbone",
    ]
    assert sorted({colour for _, _, colour, _ in Chart(figures.draw_pairs(joint, "pairs")).marks}) == [1, 2, 3]


def test_without_trials_there_is_still_a_report(tmp_path: Path, results: SearchResults) -> None:
    page = _page(tmp_path, dataclasses.replace(results, trials=(), importance={}))
    assert "No trial has finished" in page.text and "nothing to compare yet" in page.text
    assert "svg" not in page.tags and "table" not in page.tags
    failed = [dataclasses.replace(results.trials[4], reason=None)]
    page = _page(tmp_path, dataclasses.replace(_of(results, failed), importance={}))
    assert "No trial has finished" in page.text and "svg" not in page.tags
    assert _rows(page, "Failed trials") == [["4", "unknown"]]


def test_names_cannot_break_out_and_the_page_needs_nothing_else(tmp_path: Path, results: SearchResults) -> None:
    trials = [
        dataclasses.replace(
            trial,
            state="failed" if trial.number == 4 else "finished",
            reason=HOSTILE,
            settings=trial.settings | {HOSTILE: f"{HOSTILE} {trial.number % 2}", f"{HOSTILE}.": 0.5},
        )
        for trial in results.trials
    ]
    changed = dataclasses.replace(_of(results, trials), importance={HOSTILE: 1.0}, log_fields=(f"{HOSTILE}.",))
    report = tmp_path / "trials" / "00005" / "<b>'\"&" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("<!doctype html>")
    page = Page(build_search_report(tmp_path, changed, title=HOSTILE).read_text(encoding="utf-8"))
    assert page.text.count(HOSTILE) >= 9 and "<b>'\"&" in page.text
    assert "$x^2$" in "".join(Chart(figures.draw_importance(changed, "importance")).names)  # without mathematics
    forbidden = {"script", "link", "iframe", "object", "embed", "img", "b", "u", "base", "form"}
    assert not forbidden & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href", "xlink:href", "data", "action"):
            assert value.startswith("trials/00005/" if tag == "a" else "#")
    assert "@import" not in page.html and not re.search(r"url\((?!#)", page.html)
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_ids_are_unique_and_colours_are_the_theme_s(tmp_path: Path, results: SearchResults) -> None:
    page = _page(tmp_path, results)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page.html)) <= set(ids)
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.html, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #\w+", drawings)


def test_a_long_search_stays_a_page_of_reasonable_size(tmp_path: Path) -> None:
    page = _page(tmp_path, many(200))
    assert len(page.html) < 1_500_000
    assert len(_rows(page, "All trials")) == 200


@needs_browser
@pytest.mark.parametrize("kind", ["few", "joint", "many", "hostile", "none"])
def test_a_browser_shows_it_on_phone_and_desktop(
    tmp_path: Path, results: SearchResults, joint: SearchResults, kind: str
) -> None:
    long = [
        dataclasses.replace(
            trial,
            settings=trial.settings | {f"{name}.{HOSTILE}": name + HOSTILE for name in ("x" * 90, "y")},
            reason="given up: " + 20 * "a rank was lost, " + "/" + "p" * 300,
        )
        for trial in results.trials
    ]
    shown = {
        "few": results,
        "joint": joint,
        "many": many(200),
        "hostile": _of(results, long),
        "none": dataclasses.replace(results, trials=(), importance={}),
    }[kind]
    page = build_search_report(tmp_path, shown, title="rocks " + "r" * 100)
    drawings = page.read_text(encoding="utf-8").count("<svg")
    rendering = browser.render(page, tmp_path / "browser")
    assert rendering.console == [] and rendering.requests == []
    for frame in (rendering.phone, rendering.desktop):
        assert frame.scroll_width <= frame.client_width, "the page scrolls sideways"
        assert min(frame.text_heights, default=9) >= 9
        assert frame.charts == drawings
        assert "trials" in frame.text and ("All trials" in frame.text) == (kind != "none")


@needs_browser
def test_dark_mode_is_dark(tmp_path: Path, results: SearchResults) -> None:
    page = build_search_report(tmp_path, results, title="rocks")
    light, dark = (browser.render(page, tmp_path / str(mode), dark=mode) for mode in (False, True))
    channels = [[int(c) for c in re.findall(r"\d+", shown.desktop.background)[:3]] for shown in (light, dark)]
    assert min(channels[0]) > 230 and max(channels[1]) < 40
    assert dark.console == [] and dark.desktop.charts == light.desktop.charts > 5
