"""Commands given again: nothing good is destroyed by a mistake, a restart or a second thought."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import BEST, CheckpointFolder, read_checkpoint, read_info
from fpcn_dist.runs.finish import evaluate_run
from fpcn_dist.runs.folder import LOG_FILE, RunFolder
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.runs.model_folder import load_model
from fpcn_dist.runtime import processes
from fpcn_dist.runtime.errors import Preempted, UserError
from fpcn_dist.training.loop import train
from tests.helpers.distilling import ALONE, recipe
from tests.helpers.launching import losses
from tests.helpers.preempting import StopAfter

SMALL = recipe("classify", train={"keep_checkpoints": 9})
"""6 steps; checkpoints after 2, 3 (an evaluation that improves), 4 and 6."""
BEGUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}


def interrupted(chosen: Recipe, data: Path, output: Path, steps: int, **options) -> None:
    with pytest.raises(Preempted):
        train(chosen, data, output, ALONE, preemption=StopAfter(steps), **options)


@pytest.fixture(scope="module")
def once(tmp_path_factory, rocks) -> Path:
    """A finished run, which nobody may change."""
    run = tmp_path_factory.mktemp("once") / "run"
    train(SMALL, rocks, run, ALONE)
    return run


@pytest.fixture
def run(once, tmp_path) -> RunFolder:
    """A finished run."""
    shutil.copytree(once, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unfinished(run: RunFolder, *, after: int) -> None:
    """Let a finished run look as if it had been killed after the checkpoint of a step."""
    for name in ("model.safetensors", "config.json", "README.md", "report.html", "evaluation.json", "outcome.json"):
        (run.path / name).unlink()
    for step in CheckpointFolder(run.checkpoints, keep=9).steps():
        if step > after:
            (run.checkpoints / f"step-{step:08d}.safetensors").unlink()


MISTAKES = {
    "a backbone that nobody has": {"model.backbone": "resnet81"},
    "weights that are not there": {"model.pretrained": "nowhere.pth"},
    "parts that do not divide": {"train.micro_batches": 5},
    "a batch that no class fills": {"data.images_per_class": 100},
    "an image size that the network refuses": {"model.backbone": "vit_tiny_patch16_224", "data.crop": 33},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_command_that_is_refused_changes_nothing(run, rocks, mistake):
    before = content(run.path)
    with pytest.raises(UserError):
        train(SMALL.changed(**mistake), rocks, run.path, ALONE, resume="never")
    assert content(run.path) == before


def test_a_first_batch_that_cannot_be_decoded_changes_nothing(run, rocks, monkeypatch):
    before = content(run.path)
    monkeypatch.setattr("fpcn_dist.data.loader.TrainLoader._plan", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(SMALL, rocks, run.path, ALONE, resume="never")
    assert content(run.path) == before


def test_a_refused_first_command_leaves_no_folder(tmp_path, rocks):
    with pytest.raises(UserError):
        train(SMALL.changed(**{"model.backbone": "resnet81"}), rocks, tmp_path / "new", ALONE)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("without", [[], ["checkpoints"]])
def test_a_finished_run_is_finished(run, rocks, capsys, without):
    for name in without:
        shutil.rmtree(run.path / name)
    before = content(run.path)
    train(SMALL, rocks, run.path, ALONE)
    assert content(run.path) == before
    assert f"{run.path} is finished: test accuracy" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_over(run, rocks):
    shutil.rmtree(run.checkpoints)
    before = content(run.path)
    for changes, said in (({"model.hidden": 8, "seed": 5}, "images"), ({"optim.lr": 0.5}, "optim.lr 0.001 -> 0.5")):
        with pytest.raises(UserError, match=r"holds a finished run o.*--resume never") as refused:
            train(SMALL.changed(**changes), rocks, run.path, ALONE)
        assert said in str(refused.value) or "seed 0 -> 5" in str(refused.value)
    with pytest.raises(UserError, match=r"train\.epochs 2 -> 3; add --extend"):
        train(SMALL.changed(**{"train.epochs": 3}), rocks, run.path, ALONE)
    with pytest.raises(UserError, match="holds a finished run without checkpoints"):
        train(SMALL.changed(**{"train.epochs": 3}), rocks, run.path, ALONE, extend=True)
    assert content(run.path) == before


def test_what_belongs_together_changes_together(run, rocks, tmp_path):
    """Begun anew with other settings and interrupted: the old model is not measured by the new recipe."""
    old = content(run.path)
    other = SMALL.changed(**{"data.crop": 24, "seed": 3, "data.val_fraction": 0.4})
    interrupted(other, rocks, run.path, 2, resume="never")
    kept = content(run.path / "previous")
    assert all(kept[name] == old[name] for name in ("model.safetensors", "recipe.yaml", "manifest.json", "report.html"))
    assert run.open()[0].seed == 3 and len(losses(run.path)) == 2
    with pytest.raises(UserError, match="holds no config"):
        evaluate_run(run, ALONE)
    load_model(run.path / "previous")

    # A second thought: what is finished is worth more than what is not.
    interrupted(other, rocks, run.path, 1, resume="never")
    assert content(run.path / "previous") == kept

    for name in ("model.safetensors", "config.json"):
        shutil.copy(run.path / "previous" / name, run.path)
    with pytest.raises(UserError, match="is of another run than the recipe and manifest beside it"):
        load_model(run.path)


def test_a_model_knows_its_recipe_whatever_may_change_on_the_way(run):
    text = run.recipe.read_text()
    run.recipe.write_text(text.replace("threads: 1", "threads: 2"))
    load_model(run.path)
    run.recipe.write_text(text.replace("crop: 32", "crop: 24"))
    with pytest.raises(UserError, match="of another run than the recipe beside it"):
        load_model(run.path)


def test_a_path_counts_for_the_first_start(run, rocks, tmp_path, capsys, once):
    path, second = str(run.checkpoints / "step-00000002.safetensors"), tmp_path / "second"
    interrupted(SMALL, rocks, second, 1, resume=path)
    shutil.rmtree(run.path)  # nor is it needed any more
    capsys.readouterr()
    train(SMALL, rocks, second, ALONE, resume=path)
    assert f"resuming from step 3 ({second}/checkpoints/" in capsys.readouterr().out
    steps = [line["loss"] for line in read_metrics(second) if line["kind"] == "step"]
    assert steps == losses(once)[2:]
    train(SMALL, rocks, second, ALONE, resume=path)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a finished run; choose another"):
        train(SMALL, rocks, second, ALONE, resume="best")


@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/step-00000006.safetensors"])
def test_a_run_begins_from_another_ones_last_step(once, rocks, tmp_path, given):
    """Nothing is left to train, but there is a model to export."""
    train(SMALL, rocks, tmp_path / "new", ALONE, resume=str(once / given))
    for name in ("model.safetensors", "evaluation.json"):
        assert (tmp_path / "new" / name).read_bytes() == (once / name).read_bytes()


def test_a_run_goes_back_to_its_best(run, rocks, capsys, once):
    unfinished(run, after=6)
    best = read_info(run.checkpoints / BEST).step
    train(SMALL, rocks, run.path, ALONE, resume="best")
    assert f"resuming from step {best} ({run.checkpoints / BEST})" in capsys.readouterr().out
    assert losses(run.path) == losses(once)
    assert (run.path / "model.safetensors").read_bytes() == (once / "model.safetensors").read_bytes()


def test_never_counts_for_the_first_start_of_a_launcher(run, rocks, monkeypatch, capsys):
    for name, value in BEGUN.items():
        monkeypatch.setenv(name, value)
    interrupted(SMALL, rocks, run.path, 2, resume="never")
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    interrupted(SMALL, rocks, run.path, 1, resume="never")
    assert "resuming from step 2 " in capsys.readouterr().out
    monkeypatch.setattr(processes, "launcher", lambda: "another torchrun")
    interrupted(SMALL, rocks, run.path, 1, resume="never")
    assert "resuming" not in capsys.readouterr().out


def test_never_counts_for_the_first_start_of_a_batch_job(run, rocks, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    interrupted(SMALL, rocks, run.path, 2, resume="never")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    interrupted(SMALL, rocks, run.path, 1, resume="never")
    assert "resuming from step 2 " in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # one that was started again before it could write
    interrupted(SMALL, rocks, run.path, 1, resume="never")
    assert "resuming" not in capsys.readouterr().out


def cut(path: Path) -> None:
    """Damage a file, but not another name of it."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-9])


def test_a_best_that_is_damaged_is_said_and_the_best_that_is_left_taken(run, rocks, capsys, once):
    best = read_info(run.checkpoints / BEST)
    unfinished(run, after=best.step)
    cut(run.checkpoints / BEST)
    train(SMALL, rocks, run.path, ALONE)
    said = capsys.readouterr().out
    assert f"{BEST} is damaged" in said and f"the best that is left is step {best.step} with" in said
    assert (run.path / "model.safetensors").read_bytes() == (once / "model.safetensors").read_bytes()


def test_a_finished_run_whose_last_checkpoints_are_gone_makes_those_steps_again(run, rocks, capsys, once):
    for step in (4, 6):
        (run.checkpoints / f"step-{step:08d}.safetensors").unlink()
    cut(run.checkpoints / BEST)
    train(SMALL, rocks, run.path, ALONE)
    said = capsys.readouterr().out
    assert "resuming from step 3" in said and f"{BEST} is damaged" in said
    for name in ("model.safetensors", "evaluation.json"):
        assert (run.path / name).read_bytes() == (run.path / "previous" / name).read_bytes()


def test_a_finished_run_with_a_damaged_best_keeps_its_model(run, rocks, capsys):
    cut(run.checkpoints / BEST)
    before = content(run.path)
    train(SMALL, rocks, run.path, ALONE)
    said = capsys.readouterr().out
    assert f"{BEST} is damaged" in said and "is whole, and stays" in said and "is finished" in said
    assert content(run.path) == before


def test_a_finished_run_without_its_model_exports_the_best_that_is_left(run, rocks, capsys):
    info = read_info(run.checkpoints / BEST)
    for path in (run.checkpoints / BEST, run.checkpoints / f"step-{info.step:08d}.safetensors"):
        cut(path)
    cut(run.path / "model.safetensors")
    train(SMALL, rocks, run.path, ALONE)
    said = capsys.readouterr().out
    assert "it is made again from the best checkpoint" in said and f"it was step {info.step} with" in said
    assert run.read_outcome() == ("finished", None)
    load_model(run.path)


def test_a_cadence_may_change_and_a_run_may_grow(run, rocks, capsys, once):
    unfinished(run, after=4)
    often = SMALL.changed(**{"train.checkpoint_every": 1, "train.eval_every": 2, "train.log_every": 3})
    train(often, rocks, run.path, ALONE)
    assert losses(run.path) == losses(once) and (run.checkpoints / "step-00000005.safetensors").exists()
    capsys.readouterr()

    longer = often.changed(**{"train.epochs": 3})
    interrupted(longer, rocks, run.path, 1, extend=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "extended from 2 to 3 epochs at step 6: the steps so far keep the learning rates" in said
    assert (run.path / "previous/model.safetensors").exists() and not (run.path / "model.safetensors").exists()
    assert not (run.path / "previous/checkpoints").exists()
    train(longer, rocks, run.path, ALONE)
    steps = [line for line in read_metrics(run.path) if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 10)) and losses(run.path)[:6] == losses(once)
    assert run.read_outcome()[0] == "finished"


@pytest.fixture
def closed_pipe(monkeypatch) -> Iterator[None]:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1, encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield


def test_a_training_outlives_its_reader_and_keeps_a_log(tmp_path, rocks, closed_pipe):
    data = tmp_path / "größe"
    shutil.copytree(rocks, data)
    (data / "marble/bad—岩.jpg").write_bytes(b"no image")
    train(SMALL, data, tmp_path / "run", ALONE)
    assert RunFolder(tmp_path / "run").read_outcome()[0] == "finished"
    log = (tmp_path / "run" / LOG_FILE).read_text(encoding="utf-8")
    assert "bad—岩.jpg" in log and "step 6/6" in log and "test accuracy" in log and "\x1b" not in log


def test_the_log_says_how_a_run_ended(run, rocks):
    log = run.path / LOG_FILE
    before = log.read_text()
    assert before.count("step 6/6") == 1
    unfinished(run, after=2)
    interrupted(SMALL, rocks, run.path, 1)
    assert log.read_text().startswith(before) and "resuming from step 2" in log.read_text()
    assert log.read_text().endswith(
        "stopped by SIGTERM after step 3, with a checkpoint; the same command goes on from there\n"
    )


def test_the_backbone_of_a_checkpoint_is_where_a_run_begins(once, rocks, tmp_path):
    best = once / "checkpoints" / BEST
    interrupted(SMALL.changed(**{"model.pretrained": str(best)}), rocks, tmp_path / "tuned", 1)
    ours = read_checkpoint(tmp_path / "tuned/checkpoints/step-00000001.safetensors")[0].weights
    with safe_open(best, framework="pt") as theirs:
        name = next(name for name in ours if name.startswith("model.backbone.net.conv1"))
        assert (ours[name] - theirs.get_tensor(f"weights/{name}")).abs().max() < 1e-3
