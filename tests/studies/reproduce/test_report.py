"""The report of a reproduction: complete, harmless whatever the names, readable everywhere, sortable, and printable."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.reproduce import figures
from fpcn_dist.studies.reproduce.report import build_reproduction_report
from fpcn_dist.studies.reproduce.tables import (
    CAVEAT,
    Comparison,
    Heatmap,
    ReproductionResults,
    Row,
    RunRecord,
    Score,
    Table,
)
from tests.helpers import browser
from tests.helpers.chart import Chart
from tests.helpers.reproduction import HOSTILE, LOST, REASON, fabricate
from tests.runs.report.test_run import Page

needs_browser = pytest.mark.skipif(browser.BINARY is None, reason=browser.MISSING)

SYSTEMS = ("AlexNet", "LeNet", "GoogLeNet", "ResNet-50", "Bilinear CNN", "PCA-Net", "API-Net", "MMAL-Net", "FPCN")
TABLE2, TABLE3, TABLE4, FIGURE3, FIGURE4 = range(5)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def results(output: Path) -> ReproductionResults:
    return fabricate(output)


def _page(output: Path, results: ReproductionResults) -> Page:
    path = build_reproduction_report(output, results)
    assert path == output / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def _text(page: Page) -> str:
    return " ".join(page.text.split())


def _with_table(results: ReproductionResults, number: int, **changes: object) -> ReproductionResults:
    tables = list(results.tables)
    tables[number] = dataclasses.replace(tables[number], **changes)
    return dataclasses.replace(results, tables=tuple(tables))


def _each_row(table: Table, change: Callable[[Row], Row]) -> tuple[Row, ...]:
    return tuple(change(row) for row in table.rows)


def _without_spread(table: Table) -> Table:
    """With the first seed alone, so that nothing but the marks themselves is drawn."""

    def first(row: Row) -> Row:
        return dataclasses.replace(row, scores=tuple(Score(score.paper, score.ours[:1]) for score in row.scores))

    return dataclasses.replace(table, rows=_each_row(table, first))


def _without_results(results: ReproductionResults) -> ReproductionResults:
    def empty(row: Row) -> Row:
        scores = tuple(Score(score.paper, ()) for score in row.scores)
        return dataclasses.replace(row, scores=scores, runs=(), reason="not yet")

    tables = tuple(dataclasses.replace(table, rows=_each_row(table, empty)) for table in results.tables)
    return dataclasses.replace(results, tables=tables, comparisons=())


def test_everything_is_told(output: Path, results: ReproductionResults) -> None:
    results.save(output)
    page = _page(output, results)
    text = _text(page)
    assert CAVEAT in text and "data /data/rock photographs, scale tiny" in text
    assert "91.7 %" in text and "the paper: 93.1 %, on other photographs" in text  # FPCN's tile
    assert "+1.9 points" in text and "over API-Net, 89.8 %" in text and "the paper: +1.2 over MMAL-Net" in text
    assert "1,953" in text and "0, 1, 2" in text and "35 of 38" in text and "2 incomplete" in text
    assert f"PCA-Net: {REASON}" in text and f"MMAL-Net: {LOST}" in text
    for table in results.tables:
        assert f"<h2>{table.title}</h2>" in page.html and table.note in text
        for row in table.rows:
            assert all(run.command in page.text for run in row.runs)
    runs = [run for table in results.tables for _, runs in table.computations() for run in runs]
    assert len(runs) == 23 + 15 + 12 + 36 + 6 and text.count("commit 9c110457") == len(runs) + 5
    assert "How each row was computed: 23 runs, commit 9c110457, on NVIDIA H100 80GB HBM3" in text
    assert page.tags.count("svg") == 4 and page.tags.count("table") == 5
    assert "FPCN: marble 97 %, wrong" in text and "FPCN: basalt 97 %, right" in text
    assert text.count("ResNet-101: marble 52 %, wrong") == 4 and text.count("basalt, the truth") == 4
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links == ["results.csv", "results.json", "results.md"] and all((output / link).is_file() for link in links)


def test_a_row_has_the_paper_s_number_ours_and_their_difference(output: Path, results: ReproductionResults) -> None:
    html = _page(output, results).html
    (row,) = [row for row in html.split("<tr>") if ">FPCN</td>" in row and "ResNet-101" in row]
    cells = ["FPCN", "ResNet-101", "99.8", "96.7", "-3.1", "0.6", "93.1", "91.7", "-1.4", "0.6", "3"]
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == cells
    assert html.count(">difference</th>") == 5  # two in Tables 2 and 4, one in Table 3, none in the figures


def test_runs_that_have_a_report_are_linked(output: Path, results: ReproductionResults) -> None:
    folder = results.tables[0].rows[-1].runs[1].folder
    (output / folder).mkdir(parents=True)
    (output / folder / "report.html").write_text("<!doctype html>")
    links = [value for tag, name, value in _page(output, results).attributes if (tag, name) == ("a", "href")]
    assert links == [f"{folder}/report.html"]


def test_images_are_in_the_page(output: Path, results: ReproductionResults) -> None:
    sources = [value for tag, name, value in _page(output, results).attributes if (tag, name) == ("img", "src")]
    files = [file for c in results.comparisons for file in (c.jpeg, *(heatmap.jpeg for heatmap in c.heatmaps))]
    assert len(sources) == 12
    for source, file in zip(sources, files, strict=True):
        assert base64.b64decode(source.removeprefix("data:image/jpeg;base64,")) == (output / file).read_bytes()


def test_an_image_that_is_gone_is_named(output: Path, results: ReproductionResults) -> None:
    (output / "figure5" / "1-2.jpg").unlink()
    with pytest.raises(UserError, match=r"figure5/1-2\.jpg: an image of the report cannot be read"):
        build_reproduction_report(output, results)


def test_figure_3_is_drawn_over_the_logarithm_of_the_pairs(results: ReproductionResults) -> None:
    table = _without_spread(results.tables[FIGURE3])
    rows = tuple(reversed(table.rows))  # FPCN last, most pairs first
    chart = Chart(figures.draw_pairs(dataclasses.replace(table, rows=rows)))
    assert [(colour, points) for colour, points, *_ in chart.lines] == [(1, 4), (2, 4), (3, 4)]
    places = {colour: [(x, y) for x, y, mark, _ in chart.marks if mark == colour] for colour in (1, 2, 3)}
    for points in places.values():
        xs, ys = zip(*points, strict=True)
        assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)  # more pairs, better, and y points down
        for place, count in enumerate((28, 112, 441, 861)):
            share = math.log(count / 28) / math.log(861 / 28)
            assert xs[place] - xs[0] == pytest.approx(share * (xs[3] - xs[0]), abs=0.01)
    assert places[3][0][1] < places[2][0][1] < places[1][0][1]  # FPCN is best
    assert {"FPCN", "API-Net", "PCA-Net", "28", "112", "441", "861", "pairs in a batch"} <= set(chart.names)


def test_the_spread_over_seeds_is_drawn_where_there_is_one(results: ReproductionResults) -> None:
    table = results.tables[FIGURE3]
    several, one = (figures.draw_pairs(t).count("LineCollection") for t in (table, _without_spread(table)))
    assert several > 0
    heights = re.findall(r'<path d="M ([\d.]+) ([\d.]+)\s*L \1 ([\d.]+)', figures.draw_pairs(table))
    tall = [abs(float(low) - float(high)) for _, low, high in heights if 5 < abs(float(low) - float(high)) < 40]
    assert len(tall) == 12 and one == several  # of each system's points; with one seed they are empty
    assert "nan" not in figures.draw_pairs(table)


def test_figure_4_leaves_out_shares_without_images(results: ReproductionResults) -> None:
    chart = Chart(figures.draw_areas(_without_spread(results.tables[FIGURE4])))
    with_alpha, without = ([(x, y) for x, y, mark, _ in chart.marks if mark == colour] for colour in (1, 2))
    assert len(with_alpha) == len(without) == 3
    gaps = [below[1] - above[1] for above, below in zip(with_alpha, without, strict=True)]
    assert gaps[0] > gaps[1] > gaps[2] > 0  # what alpha adds shrinks with the object's size
    assert all(0 < b[0] - a[0] < with_alpha[1][0] - with_alpha[0][0] for a, b in zip(with_alpha, without, strict=True))
    names = " ".join(chart.names)
    assert "0-25%" in names and "50-75%" in names and "75-100%" not in names and "1,201 / 1,200" in names


def test_tables_2_and_4_are_drawn_beside_the_paper(results: ReproductionResults) -> None:
    table = _without_spread(results.tables[TABLE2])
    chart = Chart(figures.draw(table))
    ours, paper = ([(x, y) for x, y, mark, _ in chart.marks if mark == colour] for colour in (1, 5))
    assert len(ours) == len(paper) == 8 and all(a[1] == b[1] for a, b in zip(ours, paper, strict=True))
    rows = [row for row in table.rows if row.name != "MMAL-Net"]
    for (x, _), (other, _), row in zip(ours, paper, rows, strict=True):
        assert (x > other) == (row.scores[1].ours[0] > (row.scores[1].paper or 0))
    assert [name for name in chart.names if name in SYSTEMS] == [row.name for row in rows]
    students = Chart(figures.draw(_without_spread(results.tables[TABLE4])))
    assert [mark for *_, mark, _ in students.marks].count(1) == 3  # the teacher is not distilled
    assert figures.draw(results.tables[TABLE3]) == ""


def test_without_any_result_there_is_still_a_report(output: Path, results: ReproductionResults) -> None:
    page = _page(output, _without_results(results))
    text = _text(page)
    assert "0 of 38" in text and "svg" not in page.tags and "img" not in page.tags and "points" not in text
    assert "How each row" not in text and text.count(": not yet") == 38
    page = _page(output, dataclasses.replace(_with_table(results, TABLE2, rows=()), comparisons=()))
    assert page.tags.count("svg") == 3 and "lead" not in page.text
    page = _page(output, dataclasses.replace(results, tables=(), comparisons=()))
    assert "0 of 0" in page.text and "table" not in page.tags


def test_only_fpcn_is_no_lead(output: Path, results: ReproductionResults) -> None:
    alone = _with_table(results, TABLE2, rows=results.tables[TABLE2].rows[-1:])
    text = _text(_page(output, alone))
    assert "the paper: 93.1 %" in text and "lead" not in text


def _hostile(results: ReproductionResults) -> ReproductionResults:
    """With the same text wherever there can be one."""
    run = RunRecord(HOSTILE, 0, HOSTILE, HOSTILE, HOSTILE)

    def spoil(row: Row) -> Row:
        details = tuple(HOSTILE if isinstance(value, str) else value for value in row.details)
        return dataclasses.replace(row, name=HOSTILE, details=details, runs=(run,), reason=HOSTILE)

    tables = tuple(
        dataclasses.replace(
            table,
            title=HOSTILE,
            name=HOSTILE,
            details=(HOSTILE,) * len(table.details),
            scores=(HOSTILE,) * len(table.scores),
            rows=_each_row(table, spoil),
            note=HOSTILE,
        )
        for table in results.tables
    )
    comparisons = tuple(
        Comparison(HOSTILE, HOSTILE, c.jpeg, tuple(Heatmap(HOSTILE, HOSTILE, 0.5, h.jpeg) for h in c.heatmaps))
        for c in results.comparisons
    )
    return dataclasses.replace(
        results, data=HOSTILE, scale=HOSTILE, split=HOSTILE, tables=tables, comparisons=comparisons
    )


def test_names_cannot_break_out_and_the_page_needs_nothing_else(output: Path, results: ReproductionResults) -> None:
    page = _page(output, _hostile(results))
    assert page.text.count(HOSTILE) > 100
    assert page.tags.count("script") == 1  # the page's own
    assert not {"link", "iframe", "object", "embed", "u", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href", "xlink:href", "data", "action"):
            assert value.startswith("data:image/jpeg;base64," if tag == "img" else "#")
    assert "@import" not in page.html and not re.search(r"url\((?!#)", page.html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page.html)) <= set(ids)


def test_the_policy_allows_this_script_and_no_other(output: Path, results: ReproductionResults) -> None:
    page = _page(output, results)
    (script,) = re.findall(r"<script>(.*?)</script>", page.html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert ("meta", "content", policy) in page.attributes


@needs_browser
@pytest.mark.parametrize("kind", ["full", "hostile", "empty"])
def test_a_browser_shows_it_on_phone_desktop_and_paper(
    output: Path, results: ReproductionResults, kind: str, tmp_path: Path
) -> None:
    shown = {"full": results, "hostile": _hostile(results), "empty": _without_results(results)}[kind]
    page = build_reproduction_report(output, shown)
    drawings, images = page.read_text(encoding="utf-8").count("<svg"), 3 * len(shown.comparisons)
    rendering = browser.render(page, tmp_path / "browser")
    assert rendering.console == [] and rendering.requests == []
    for frame in (rendering.phone, rendering.desktop, rendering.paper):
        assert frame.charts == drawings and frame.images == [256] * images
        if kind != "hostile" or frame is not rendering.paper:  # no paper is wide enough for 16 such headings
            assert frame.scroll_width <= frame.client_width, "the page scrolls sideways"
            assert min(frame.text_heights, default=9) >= 9
    if kind == "full":
        assert rendering.desktop.clipped == rendering.paper.clipped == 0, "a table is wider than the page"
        assert 0 < rendering.phone.clipped <= 5
    commands = [run.command for table in shown.tables for _, runs in table.computations() for run in runs]
    assert rendering.phone.code == rendering.desktop.code == []  # until they are asked for
    assert rendering.paper.code == commands


@needs_browser
def test_dark_mode_is_dark(output: Path, results: ReproductionResults, tmp_path: Path) -> None:
    page = build_reproduction_report(output, results)
    light, dark = (browser.render(page, tmp_path / str(mode), dark=mode) for mode in (False, True))
    channels = [[int(c) for c in re.findall(r"\d+", shown.desktop.background)[:3]] for shown in (light, dark)]
    assert min(channels[0]) > 230 and max(channels[1]) < 40
    assert dark.console == [] and dark.desktop.charts == light.desktop.charts == 4


def _column(sorting: browser.Sorting, number: int) -> list[str]:
    return [row[number] for row in sorting.rows]


@needs_browser
def test_a_click_on_a_head_sorts_its_table(output: Path, results: ReproductionResults, tmp_path: Path) -> None:
    page = build_reproduction_report(output, results)
    clicks = [
        (TABLE2, 7),
        (TABLE2, 7),
        (TABLE2, 0),
        (TABLE2, 1),
        (TABLE2, 1),
        (TABLE4, 3),
        (FIGURE3, 1),
        (FIGURE4, 2),
        (TABLE2, 4),
    ]
    sorted_, console = browser.click(page, tmp_path / "browser", clicks)
    assert console == [] and all(sorting.focused for sorting in sorted_)
    up, down, names, backbones, reverse, flops, pairs, images, differences = sorted_

    ours = ["48.9", "65.1", "79.2", "82.1", "85.4", "87.7", "89.8", "91.7"]
    assert _column(up, 7) == [*ours, "-"] and up.heads == {"7": "ascending"}
    assert _column(down, 7) == [*reversed(ours), "-"] and down.heads == {"7": "descending"}
    assert [row[0] for row in down.rows][:2] == ["FPCN", "API-Net"]  # whole rows have moved
    assert down.rows[0] == ["FPCN", "ResNet-101", "99.8", "96.7", "-3.1", "0.6", "93.1", "91.7", "-1.4", "0.6", "3"]

    assert _column(names, 0) == sorted(SYSTEMS, key=str.lower) and names.heads == {"0": "ascending"}
    # ResNet-50 before ResNet-101, empty cells last either way, and equal ones as they were: by name.
    named = ["ResNet-50", "ResNet-101", "ResNet-101", "ResNet-101", "VGG16", "", "", "", ""]
    assert _column(backbones, 1) == named and _column(reverse, 1) == [*reversed(named[:5]), *named[5:]]
    rest = ["AlexNet", "GoogLeNet", "LeNet", "ResNet-50"]
    assert _column(backbones, 0) == ["MMAL-Net", "API-Net", "FPCN", "PCA-Net", "Bilinear CNN", *rest]
    assert _column(reverse, 0) == ["Bilinear CNN", "API-Net", "FPCN", "PCA-Net", "MMAL-Net", *rest]

    assert _column(flops, 3) == ["1.184", "1.252", "7.296", "56.42"]
    assert _column(pairs, 1) == ["28"] * 3 + ["112"] * 3 + ["441"] * 3 + ["861"] * 3
    assert _column(pairs, 0)[:3] == ["FPCN", "API-Net", "PCA-Net"]
    assert _column(images, 2) == ["111", "112", "639", "640", "1,200", "1,201", "", ""]  # not as texts
    signed = ["-26.7", "-5.0", "-3.1", "-2.4", "-2.2", "+3.8", "+5.0", "+7.5", "-"]
    assert _column(differences, 4) == signed and differences.heads == {"4": "ascending"}


@needs_browser
def test_another_script_does_not_run(output: Path, results: ReproductionResults, tmp_path: Path) -> None:
    page = build_reproduction_report(output, results)
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace('"use strict";', '"use strict"; ', 1), encoding="utf-8")
    (sorting,), console = browser.click(page, tmp_path / "browser", [(TABLE2, 7)])
    assert any("Content Security Policy" in line for line in console)
    assert not sorting.focused and sorting.heads == {} and tuple(row[0] for row in sorting.rows) == SYSTEMS


@needs_browser
@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext: apt-get install poppler-utils")
def test_everything_is_printed(output: Path, results: ReproductionResults, tmp_path: Path) -> None:
    pdf = browser.print_pages(build_reproduction_report(output, results), tmp_path / "browser")
    done = subprocess.run(["pdftotext", "-raw", str(pdf), "-"], capture_output=True, text=True, check=True)
    text = "".join(done.stdout.split())
    assert done.stdout.count("\f") <= 8  # pages
    for table in results.tables:
        assert "".join(table.title.split()) in text
        for _, runs in table.computations():
            assert all(f"--seed{run.seed}" in text for run in runs)
    count = sum(len(runs) for table in results.tables for _, runs in table.computations())
    assert text.count("pythonlaunch/train.py") == count
    assert "".join(LOST.split()) in text and "0-25%" in text and "thetruth" in text
