"""Trainings that end without an evaluation: there are no images for one, or none is asked for."""

from __future__ import annotations

import pytest

from fpcn_dist.runs.finish import evaluate_run
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.training.loop import train, train_together
from tests.helpers.distilling import ALONE, recipe


def test_it_finishes_with_the_last_weights_and_a_report(tmp_path, rocks, capsys):
    chosen = recipe("classify", data={"val_fraction": 0.0, "test_fraction": 0.0}, train={"epochs": 1})
    run = RunFolder(tmp_path / "run")
    train(chosen, rocks, run.path, ALONE)
    assert run.read_outcome() == ("finished", None)
    assert "nothing was evaluated: the data have no validation or test images\n" in capsys.readouterr().out
    assert (run.path / "model.safetensors").exists() and (run.path / "README.md").exists()
    report = (run.path / "report.html").read_text(encoding="utf-8")
    assert "has not been evaluated" in report and "Learning rate" in report

    with pytest.raises(UserError, match="--split val: the data have no such images; choose one of train"):
        evaluate_run(run, ALONE)

    looked_at = []
    evaluate_run(run, ALONE, split="train", frozen=lambda model, images: looked_at.append(images) or model)
    assert (run.path / "evaluation.json").exists() and looked_at == [72]
    train(chosen, rocks, run.path, ALONE, resume="never")  # other weights, for all that is known
    assert not (run.path / "evaluation.json").exists() and not (run.path / "samples").exists()
    assert (run.path / "previous/evaluation.json").exists()


def test_a_model_that_is_not_evaluated_can_be_later(tmp_path, rocks):
    run = RunFolder(tmp_path / "run")
    train_together({run.path: recipe("classify", train={"epochs": 1})}, rocks, ALONE, evaluate=False)
    assert run.read_outcome() == ("finished", None) and (run.path / "model.safetensors").exists()
    assert not (run.path / "report.html").exists() and not (run.path / "evaluation.json").exists()
    assert evaluate_run(run, ALONE).images == len(run.open()[1].ids("test"))
    assert (run.path / "report.html").exists() and (run.path / "README.md").exists()
