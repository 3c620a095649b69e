"""The probe of a backbone: on a folder, and of a run's own before its first step."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.models import build_backbone
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.probe import Probe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.ranks import connect
from fpcn_dist.training import probe
from fpcn_dist.training.loop import train
from fpcn_dist.training.probe import centre_features, probe_folder
from tests.helpers.distilling import ALONE, CPU, recipe
from tests.helpers.forked import start_ranks
from tests.helpers.launching import free_port, losses


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of weights that stand for published ones."""
    path = tmp_path_factory.mktemp("weights") / "published.safetensors"
    torch.manual_seed(5)
    save_file(build_backbone("test_resnet").net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def chosen(weights) -> Recipe:
    return recipe("classify", model={"pretrained": str(weights)}, train={"epochs": 1}, data={"eval_batch_size": 7})


@pytest.fixture(scope="module")
def finished(chosen, rocks, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("probed") / "run"
    train(chosen, rocks, output, ALONE)
    return output


def test_features_are_the_pooled_ones_of_the_central_views(chosen, rocks):
    manifest = build_manifest(rocks, chosen.data, chosen.seed)
    backbone = build_backbone("test_resnet", pretrained=chosen.model.pretrained)
    ids = np.concatenate([manifest.ids("train")[:9], manifest.ids("test")[:4]])
    features = centre_features(backbone, manifest, ids, chosen, CPU)
    assert features.shape == (13, backbone.channels) and backbone.training
    one = centre_features(backbone, manifest, ids[11:12], chosen.changed(**{"data.flip": False, "seed": 3}), CPU)
    assert np.allclose(features[11], one[0], atol=1e-6) and not np.allclose(features[11], features[10], atol=1e-4)


def test_a_folder_is_probed_on_the_split_of_a_run(chosen, rocks, finished, tmp_path, capsys):
    found = probe_folder(chosen, rocks, CPU, output=tmp_path / "probe")
    assert found == Probe.load(tmp_path / "probe") == Probe.load(finished)
    assert (found.split, found.images, found.training, found.folds) == ("test", 15, 42, 0)
    shown = capsys.readouterr().out
    assert "frozen test_resnet at 32 px, 15 test images, fitted to 42" in shown
    assert "logistic regression" in shown and "nearest class mean" in shown


def test_folds_are_over_all_images(chosen, rocks, capsys):
    """Of any composition of batches: a probe has none."""
    found = probe_folder(chosen.changed(**{"data.images_per_class": 999}), rocks, CPU, folds=3)
    assert (found.split, found.images, found.training, found.folds) == ("all", 72, 48, 3)
    assert "72 images in 3 folds" in capsys.readouterr().out


def test_a_probe_that_cannot_be_made_is_explained(chosen, rocks, tmp_path):
    with pytest.raises(UserError, match=r"--folds 1: .*; take 2 or more"):
        probe_folder(chosen, rocks, CPU, folds=1)
    with pytest.raises(UserError, match=r"--folds 25: class 'basalt' has only 24 image\(s\)"):
        probe_folder(chosen, rocks, CPU, folds=25)
    alone = tmp_path / "data"
    (alone / "basalt").mkdir(parents=True)
    (alone / "basalt" / "1.jpg").symlink_to(next((rocks / "basalt").iterdir()))
    with pytest.raises(UserError, match="it holds one class only"):
        probe_folder(chosen, alone, CPU)
    (alone / "marble").symlink_to(rocks / "marble")
    with pytest.raises(UserError, match=r"--folds 2: class 'basalt' has only 1 image"):
        probe_folder(chosen, alone, CPU, folds=2)
    nothing_left = chosen.changed(**{"data.val_fraction": 0, "data.test_fraction": 0})
    with pytest.raises(UserError, match="no validation or test images"):
        probe_folder(nothing_left, rocks, CPU)


@pytest.fixture
def without_scikit_learn(monkeypatch) -> None:
    importing = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_scikit_learn_a_probe_is_refused_and_a_run_goes_on(
    chosen, rocks, finished, tmp_path, capsys, without_scikit_learn
):
    with pytest.raises(UserError, match=r"package sklearn: is not installed; pip install scikit-learn"):
        probe_folder(chosen, rocks, CPU)
    train(chosen, rocks, tmp_path / "run", ALONE)
    assert "no probe of the backbone: package sklearn: is not installed" in capsys.readouterr().out
    assert not (tmp_path / "run" / "probe.json").exists()
    assert losses(tmp_path / "run") == losses(finished)  # a probe changes nothing


def test_a_pretrained_run_says_whether_it_beats_its_probe(finished):
    found, evaluation = Probe.load(finished), Evaluation.load(finished)
    assert found is not None and evaluation is not None
    verdict = found.verdict(evaluation)
    assert "the probe" in verdict and not verdict.startswith("Not compared")
    assert verdict in (finished / "README.md").read_text()
    report = (finished / "report.html").read_text()
    assert verdict in report and "nearest class mean" in report and "balanced accuracy" in report


def test_a_probe_is_made_before_the_first_step_and_once(chosen, rocks, tmp_path, monkeypatch, capsys):
    made, make = [], probe.probe_backbone
    monkeypatch.setattr(probe, "probe_backbone", lambda *args, **options: made.append(1) or make(*args, **options))
    train(chosen, rocks, tmp_path, ALONE)
    shown = capsys.readouterr().out
    assert len(made) == 1 and shown.index("The bar to beat") < shown.index("step 1/")
    before = (tmp_path / "probe.json").stat().st_mtime_ns

    train(chosen, rocks, tmp_path, ALONE)  # resumed
    train(chosen, rocks, tmp_path, ALONE, resume="never")
    assert len(made) == 1 and (tmp_path / "probe.json").stat().st_mtime_ns == before

    larger = {"data.resize": 48, "data.crop": 40}
    train(chosen.changed(**larger), rocks, tmp_path, ALONE, resume="never")
    found = Probe.load(tmp_path)
    assert len(made) == 2 and found is not None and found.size == 40

    (tmp_path / "probe.json").write_text("damaged")
    monkeypatch.setattr(probe, "MOST_IMAGES", 71)
    train(chosen, rocks, tmp_path, ALONE, resume="never")
    assert "no probe of the backbone: images 72: more than the 71" in capsys.readouterr().out
    assert len(made) == 2 and not (tmp_path / "probe.json").exists()


def test_a_run_from_scratch_has_no_probe_and_none_of_another(chosen, rocks, tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "probe.json").write_text(json.dumps({}))
    train(chosen.changed(**{"model.pretrained": False}), rocks, tmp_path, ALONE, resume="never")
    assert not (tmp_path / "probe.json").exists()
    assert "The bar to beat" not in (tmp_path / "report.html").read_text()


def _train_on_a_rank(rank: int, port: int, chosen: Recipe, data: Path, output: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with connect() as ranks:
        train(chosen, data, output, ranks)


@pytest.mark.slow
def test_one_of_two_ranks_makes_it(chosen, rocks, finished, tmp_path):
    start_ranks(_train_on_a_rank, free_port(), chosen, rocks, tmp_path / "run", ranks=2)
    assert Probe.load(tmp_path / "run") == Probe.load(finished)
