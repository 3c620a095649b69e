"""The report of a distillation: complete, self-contained, harmless whatever the names, readable everywhere."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fpcn_dist.models.cost import Cost
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.studies.distill.report import build_distillation_report, draw_accuracy_against_cost
from fpcn_dist.studies.distill.results import DistillationResults, StudentRow, TeacherRow
from tests.helpers import browser
from tests.runs.report.test_run import Page

needs_browser = pytest.mark.skipif(browser.BINARY is None, reason=browser.MISSING)

HOSTILE = "<script>alert('1')</script> & {{ 7 * 7 }} $x^2$"
STUDENTS = (
    ("resnet18", 3.6, 0.912, 0.925),
    ("resnet34", 7.3, 0.918, 0.931),
    ("resnet50", 8.2, 0.935, 0.941),
    ("mobilenet_v1", 1.1, 0.90, 0.914),
    ("mobilenet_v2", 0.6, 0.895, 0.913),
    ("shufflenet_v2_x1_5", 0.59, 0.897, 0.905),
)


def _score(accuracy: float) -> Evaluation:
    return Evaluation("test", "best.safetensors", 7, 1200, 0.5, accuracy, (), (), ())


@pytest.fixture
def results() -> DistillationResults:
    students = tuple(
        StudentRow(name, Cost(11_200_000, int(gflops * 1e9), 3 * gflops), _score(distilled), _score(baseline), {})
        for name, gflops, baseline, distilled in STUDENTS
    )
    teacher = TeacherRow(
        Path("/data/runs/teacher of <all>"),
        "0123456789abcdef" * 4,
        "resnet101",
        224,
        Cost(46_000_000, 15_700_000_000, 90.0),
        _score(0.9512),
    )
    return DistillationResults(teacher, students, True, "2 CPU thread(s)")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """With the reports of two runs."""
    for run in ("resnet18", "resnet18-baseline"):
        (tmp_path / "out" / run).mkdir(parents=True)
        (tmp_path / "out" / run / "report.html").write_text("<!doctype html>")
    return tmp_path / "out"


def _page(output: Path, results: DistillationResults) -> Page:
    path = build_distillation_report(output, results)
    assert path == output / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def _without(results: DistillationResults, name: str, reason: str) -> DistillationResults:
    """``results`` as they are if a student failed with its baseline."""
    reasons = {name: reason, f"{name}-baseline": "given up"}
    rows = [StudentRow(name, None, None, None, reasons) if row.name == name else row for row in results.students]
    return dataclasses.replace(results, students=tuple(rows))


def test_everything_is_told(output: Path, results: DistillationResults) -> None:
    page = _page(output, results)
    text = " ".join(page.text.split())
    assert "95.1 %" in text and "resnet101, 15.7 GFLOPs" in text  # the teacher's tile
    assert "94.1 %" in text and "resnet50, 8.2 GFLOPs" in text  # the best student's
    assert "shufflenet_v2_x1_5, 26.6 times less than the teacher" in text
    assert "+1.2 points" in text and "mean of 6 students" in text and "6 of 6" in text
    for heading in ("params M", "GFLOPs", "ms", "baseline %", "distilled %", "gain"):
        assert f'<th scope="col">{heading}</th>' in page.html
    assert "".join(f"<td>{cell}</td>" for cell in ("11.2", "3.60", "10.8", "91.2", "92.5", "+1.3")) in page.html
    assert results.caption in text
    assert results.teacher.sha256 in text and str(results.teacher.folder) in text
    assert "95.1 % of 1200 test images" in text
    assert page.tags.count("svg") == 1 and "Without a result" not in text


def test_runs_that_have_a_report_are_linked(output: Path, results: DistillationResults) -> None:
    links = [value for tag, name, value in _page(output, results).attributes if (tag, name) == ("a", "href")]
    assert links == ["resnet18/report.html", "resnet18-baseline/report.html"]
    assert all((output / link).is_file() for link in links)


def test_the_plot_marks_each_result_where_it_is(results: DistillationResults) -> None:
    svg = ElementTree.fromstring(draw_accuracy_against_cost(results).replace("xlink:", ""))
    texts = ["".join(node.itertext()).strip() for node in svg.iter() if node.tag.endswith("text")]
    assert {"teacher", "distilled", "baseline", "GFLOPs of one image", *(name for name, *_ in STUDENTS)} <= set(texts)
    assert not any("^" in text or text.startswith("$") for text in texts)
    marked = {}
    for colour in (1, 2, 5):
        uses = [
            (float(node.get("x")), float(node.get("y")))
            for node in svg.iter()
            if node.tag.endswith("use") and f"stroke: var(--series-{colour})" in node.get("style", "")
        ]
        marked[colour] = uses[:-1] if len(uses) > 1 else uses  # the legend's own is drawn last
    assert [len(marked[colour]) for colour in (1, 2, 5)] == [6, 1, 6]
    for (x, y), (x_before, y_before) in zip(marked[1], marked[5], strict=True):
        assert x == x_before and y < y_before  # all students have gained, and the page's y axis points down
    costs = [gflops for _, gflops, _, _ in STUDENTS]
    for i in range(2, 6):  # logarithmic: equal ratios are equal distances
        distance = marked[1][1][0] - marked[1][0][0]
        ratio = math.log(costs[i] / costs[0]) / math.log(costs[1] / costs[0])
        assert marked[1][i][0] - marked[1][0][0] == pytest.approx(ratio * distance, abs=0.01)


def test_a_student_without_a_result_keeps_its_row(output: Path, results: DistillationResults) -> None:
    page = _page(output, _without(results, "resnet50", "given up: <u>lost</u>"))
    text = " ".join(page.text.split())
    assert "5 of 6" in text and "mean of 5 students" in text
    assert "Without a result" in text and "given up: <u>lost</u>" in text and "resnet50-baseline" in text
    assert re.search(r"resnet50</td>(<td>-</td>){6}", page.html)


def test_without_any_result_there_is_still_a_report(output: Path, results: DistillationResults) -> None:
    for name, *_ in STUDENTS:
        results = _without(results, name, "no disk")
    results = dataclasses.replace(results, teacher=dataclasses.replace(results.teacher, evaluation=None))
    page = _page(output, results)
    assert "0 of 6" in page.text and "not evaluated" in page.text and "svg" not in page.tags


def test_one_student_without_baselines_or_a_scored_teacher(output: Path, results: DistillationResults) -> None:
    teacher = dataclasses.replace(results.teacher, evaluation=None)
    student = dataclasses.replace(results.students[0], baseline=None)
    page = _page(output, dataclasses.replace(results, teacher=teacher, students=(student,), baselines=False))
    assert '<th scope="col">accuracy %</th>' in page.html and ">gain<" not in page.html
    assert "baseline" not in page.text and page.tags.count("svg") == 1


def test_names_cannot_break_out_and_the_page_needs_nothing_else(output: Path, results: DistillationResults) -> None:
    rows = (dataclasses.replace(results.students[0], name=HOSTILE), *results.students[1:])
    teacher = dataclasses.replace(results.teacher, backbone=HOSTILE)
    page = _page(output, dataclasses.replace(results, students=rows, teacher=teacher))
    assert page.text.count(HOSTILE) >= 3  # in the table as it is, in the plot without mathematics
    assert not {"script", "link", "iframe", "object", "embed", "img", "all", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href", "xlink:href", "data", "action") and tag != "a":
            assert value.startswith("#")
    assert "@import" not in page.html and not re.search(r"url\((?!#)", page.html)
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


@needs_browser
def test_a_browser_shows_it_on_phone_and_desktop(output: Path, results: DistillationResults, tmp_path: Path) -> None:
    page = build_distillation_report(output, _without(results, "resnet34", "given up: " + 20 * "a rank was lost, "))
    shown = browser.render(page, tmp_path / "browser")
    assert shown.console == [] and shown.requests == []
    for frame in (shown.phone, shown.desktop):
        assert frame.scroll_width <= frame.client_width, "the page scrolls sideways"
        assert frame.charts == 1 and min(frame.text_heights) >= 9
        assert results.teacher.sha256 in frame.text
