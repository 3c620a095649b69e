"""Working inside the data folder: what commands write there is never learnt, however often they are started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.folders import find_files
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.training.loop import train
from tests.helpers.distilling import ALONE, recipe


@pytest.mark.slow
def test_the_same_command_twice_with_its_output_inside_the_data(tmp_path, rocks, monkeypatch, capsys):
    data = Path(shutil.copytree(rocks, tmp_path / "data"))
    monkeypatch.chdir(data)
    images = find_files([Path()])
    chosen, run = recipe("classify", train={"epochs": 1}), Path("runs/tiny-data")
    train(chosen, Path(), run, ALONE)
    before = Manifest.load(run / "manifest.json")
    assert before.classes == ("basalt", "dolomite", "marble") and list(run.glob("samples/*.jpg"))
    train(chosen, Path(), run, ALONE)
    assert f"{run} is finished" in capsys.readouterr().out
    now = build_manifest(Path(), chosen.data, chosen.seed)
    assert now.hash == before.hash
    left_out = ("runs/", "left out: outputs of this project's commands")
    assert [tuple(notice) for notice in now.notices] == [tuple(notice) for notice in before.notices] == [left_out]
    assert "About the data" in (run / "report.html").read_text(encoding="utf-8")
    assert find_files([Path()]) == images
