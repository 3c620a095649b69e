"""The whole study at a tiny size: every question answered, killed and gone on with, and refused where it cannot be."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.crossval import cells, parts, questions, study
from launch import study as command
from tests.helpers.launching import ROOT, run_command

TINY = (
    *(
        "--networks",
        "test_efficientnet=false,test_efficientnet_gn=false",
        "--folds",
        "2",
        "--seeds",
        "2",
        "--stage-seeds",
        "1",
    ),
    *("--steps", "2", "--data.resize", "66", "--data.crop", "64", "--data.views", "2", "--data.images-per-class", "4"),
    *("--model.hidden", "8", "--data.threads", "1"),
)


def _run(*words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ALIKE", 1.1)  # to networks that know nothing all photographs are alike
        patch.setattr(study, "usable_cores", lambda: 1)  # one process, in which the tests look
        patch.setattr(sys, "argv", ["launch/study.py", *words])
        command.main()


@pytest.fixture(scope="module")
def finished(rocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of three questions."""
    output = tmp_path_factory.mktemp("study") / "out"
    _run("--data", str(rocks), "--output", str(output), "--only", "best,batch,inference", *TINY)
    return output


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_row_has_its_line_in_each_table(finished: Path) -> None:
    asked = questions.questions("best,batch,inference", 12, 4, 8)
    lines = _read(finished / "results.csv")
    for network in ("test_efficientnet", "test_efficientnet_gn"):
        for row in questions.rows_of(asked):
            for reading in row.readings:
                own = [
                    line
                    for line in lines
                    if (line["network"], line["row"], line["reading"]) == (network, row.name, reading)
                ]
                assert len(own) == {"probe": 1, "head": 2, "stage": 1}[row.depth]
                assert all(0 <= float(line[score]) <= 1 for line in own for score in ("accuracy", "balanced", "ece"))
                assert float(own[0]["rate"]) in questions.RATES[row.depth] and float(own[0]["log_loss"]) > 0
    readable = (finished / "results.md").read_text(encoding="utf-8")
    for question in asked:
        assert question.title in readable
        figure = ElementTree.parse(finished / "figures" / f"{question.key}.svg").getroot()
        shown = " ".join(text for element in figure.iter() for text in element.itertext())
        assert all(row.name in shown for row in question.rows) and "test_efficientnet_gn" in shown
    compared = _read(finished / "comparisons.csv")
    plain = [line for line in compared if line["row"] == "FPCN, all pairs, last stage"]
    assert [line["reference"] for line in plain] == ["plain, last stage"] * 2
    assert all(float(line["low"]) <= float(line["difference"]) <= float(line["high"]) for line in compared)
    assert {line["question"] for line in compared} == {"best", "inference"}  # batches have no reference


@pytest.mark.slow
def test_it_goes_on_with_what_is_missing_and_takes_more_questions(
    finished: Path, rocks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.csv").read_text()
    lost = sorted(finished.glob("*/cells/*/*seed-1-fold-1*"))[:2]
    for path in lost:
        path.unlink()
    trained = []
    monkeypatch.setattr(study, "measure", lambda cell, threads: trained.append(cell) or cells.measure(cell, threads))
    words = ("--data", str(rocks), "--output", str(finished), *TINY)
    _run("--only", "best,batch,inference", *words)
    assert sorted(cell.path for cell in trained) == lost
    times = ("seconds", "departure")
    after = _read(finished / "results.csv")
    for line, old in zip(after, csv.DictReader(before.splitlines()), strict=True):
        assert {k: v for k, v in line.items() if k not in times} == {k: v for k, v in old.items() if k not in times}
    trained.clear()
    _run("--only", "regular", *words)
    known = {row.name for row in questions.rows_of(questions.questions("best", 12, 4, 8))}
    assert trained and not {cell.row.name for cell in trained} & known
    assert "results " in capsys.readouterr().out


@pytest.mark.slow
def test_another_study_is_not_mixed_with_it(finished: Path, rocks: Path) -> None:
    before = (finished / "results.csv").read_text()
    with pytest.raises(UserError, match=r"holds a study with another steps \(2, now 3\)"):
        _run("--data", str(rocks), "--output", str(finished), *TINY, "--steps", "3")
    assert (finished / "results.csv").read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "beste"), "--only beste: is no question of the study"),
        (("--folds", "1"), "--folds 1: leaves nothing to measure; take 2 or more"),
        (("--seeds", "0"), "--seeds 0: leaves nothing to measure; take 1 or more"),
        (("--networks", "resnet18,,"), "--networks resnet18,,: names no network; write NAME=WEIGHTS"),
        (("--networks", "resnet18,resnet18"), "names a network twice"),
        (("--networks", "resnet81=false"), "resnet81"),
        (("--networks", "resnet18=nowhere.safetensors"), "nowhere.safetensors"),
        (("--networks", "test_resnet=false", "--only", "best"), "its layers do not follow one another"),
        (("--data.images-per-class", "None"), "data.images_per_class"),
        (("--data.images-per-class", "40"), "images_per_class"),
    ],
)
def test_what_cannot_be_studied_is_said_in_a_line(
    rocks: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    tiny = ("--networks", "test_efficientnet=false", "--data.resize", "66", "--data.crop", "64")
    with pytest.raises(UserError, match=re.escape(message)):
        _run("--data", str(rocks), "--output", str(tmp_path / "out"), *tiny, "--steps", "1", *words)


def test_a_wrong_command_ends_in_a_line(rocks: Path, tmp_path: Path) -> None:
    ended = run_command(
        [sys.executable, str(ROOT / "launch/study.py"), "--data", str(rocks), "--only", "beste", "--output", "out"],
        tmp_path,
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: --only beste: is no question of the study")
    assert not list(tmp_path.glob("out/*/*"))
