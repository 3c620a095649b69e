"""Checkpoints: whole or not there, verified, portable, and refused where they do not fit."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fpcn_dist.recipe.preprocessing import IMAGENET
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import (
    BEST,
    Checkpoint,
    CheckpointFolder,
    CheckpointInfo,
    TrainingState,
    read_checkpoint,
    require_same_recipe,
    write_checkpoint,
)
from fpcn_dist.runtime.errors import UserError


def state(step: int = 3, size: int = 5) -> TrainingState:
    torch.manual_seed(step)
    weights = {"model.a.weight": torch.randn(size, 2), "model.steps": torch.tensor(7)}
    weights["model.half"] = torch.ones(3).bfloat16()
    moments = {"model.a.weight": {"exp_avg": torch.randn(size, 2), "step": torch.tensor(3.0)}}
    return TrainingState(step, weights, moments, {"module.a.weight": torch.randn(size, 2)})


def info(step: int = 3, **values) -> CheckpointInfo:
    return CheckpointInfo(step, Recipe().model_dump(), "hash", ("a", "b"), **values)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        same(a[k], b[k]) if isinstance(a[k], dict) else torch.equal(a[k], b[k]) for k in a
    )


def path_of(checkpoint: Checkpoint | None) -> Path | None:
    return checkpoint and checkpoint.path


def test_round_trip(tmp_path):
    write_checkpoint(tmp_path / "x", state(), info(accuracy=0.5))
    loaded, said = read_checkpoint(tmp_path / "x")
    assert said == info(accuracy=0.5)
    assert loaded.step == 3
    assert same(loaded.weights, state().weights)
    assert same(loaded.optimizer, state().optimizer)
    assert same(loaded.ema, state().ema)


def test_keeps_the_last_and_the_best(tmp_path):
    with CheckpointFolder(tmp_path / "checkpoints", keep=2) as folder:
        for step in (1, 2, 3, 4):
            folder.save(state(step), info(step, accuracy=step == 2), best=step == 2)
    assert folder.steps() == [3, 4]
    assert read_checkpoint(folder.folder / BEST)[1].step == 2
    assert path_of(folder.newest()) == folder.path(4)
    folder.clear()
    assert folder.newest() is None
    assert not (folder.folder / BEST).exists()


def evaluated(folder: CheckpointFolder, accuracies: dict[int, float | None]) -> None:
    """Save a checkpoint of each step, as a run does that scores so."""
    best = None
    for step, accuracy in accuracies.items():
        improved = accuracy is not None and (best is None or accuracy > best[1])
        best = (step, accuracy) if accuracy is not None and improved else best
        folder.save(state(step), info(step, accuracy=accuracy, best=best), best=improved)
    folder.wait()


def damage(path: Path, how: str) -> None:
    """Spoil a file, but not another name of it."""
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[-1] ^= 1
    path.unlink()
    if how != "removed":
        path.write_bytes({"truncated": data[:-9], "flipped": data}[how])


def test_the_best_so_far_stands_in_every_checkpoint(tmp_path):
    with CheckpointFolder(tmp_path, keep=3) as folder:
        assert folder.best() is None
        evaluated(folder, {1: None, 2: 0.75, 3: None, 4: 0.5})
    best = folder.best()
    assert best is not None and best.path == tmp_path / BEST and best.info.step == 2
    assert [read_checkpoint(folder.path(step))[1].best for step in (2, 3, 4)] == [(2, 0.75)] * 3


@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
def test_in_the_place_of_a_lost_best_comes_the_best_that_is_left(tmp_path, how):
    warnings = []
    with CheckpointFolder(tmp_path, keep=3, warn=warnings.append) as folder:
        evaluated(folder, {1: 0.7, 2: 0.5, 3: 0.6, 4: None})
    damage(tmp_path / BEST, how)
    best = folder.best()
    assert best is not None and best.info.step == 3 and read_checkpoint(tmp_path / BEST)[1].step == 3
    (said,) = warnings
    assert ("is missing" if how == "removed" else "is damaged") in said
    assert "it was step 1 with 0.7000; the best that is left is step 3 with 0.6000" in said
    assert path_of(folder.best()) == tmp_path / BEST and len(warnings) == 1  # it is whole again


def test_a_lost_best_is_found_again_in_its_own_checkpoint(tmp_path):
    with CheckpointFolder(tmp_path, keep=3, warn=lambda _: None) as folder:
        evaluated(folder, {1: 0.5, 2: 0.7, 3: 0.6})
    damage(tmp_path / BEST, "truncated")
    best = folder.best()
    assert best is not None and best.info.step == 2


def test_a_best_of_which_nothing_is_left_is_said(tmp_path):
    warnings = []
    with CheckpointFolder(tmp_path, keep=1, warn=warnings.append) as folder:
        evaluated(folder, {1: 0.7, 2: None})
    damage(tmp_path / BEST, "truncated")
    assert folder.best() is None
    assert "it was step 1 with 0.7000; no other checkpoint was validated" in warnings[0]


def test_checkpoints_are_kept_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with CheckpointFolder(tmp_path, keep=3) as folder:
        evaluated(folder, {1: 0.5, 2: 0.7})
    assert (tmp_path / BEST).read_bytes() == folder.path(2).read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "text"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path, damage):
    warnings = []
    with CheckpointFolder(tmp_path, keep=3, warn=warnings.append) as folder:
        for step in (1, 2):
            folder.save(state(step), info(step), best=False)
    path = folder.path(2)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    path.write_bytes({"truncated": data[:-9], "flipped": data, "emptied": b"", "text": b"hello" * 9}[damage])
    assert path_of(folder.newest()) == folder.path(1)
    assert len(warnings) == 1 and str(path) in warnings[0]


def test_nothing_whole_is_an_error(tmp_path):
    with CheckpointFolder(tmp_path, keep=3, warn=lambda _: None) as folder:
        folder.save(state(1), info(1), best=False)
    folder.path(1).write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 checkpoints is whole"):
        folder.newest()


def test_missing_and_foreign(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "absent")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="not written by fpcn_dist"):
        read_checkpoint(tmp_path / "foreign")
    torch.save({"a": 1}, tmp_path / "pickle")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        read_checkpoint(tmp_path / "pickle")


def test_changed_recipes_are_refused_field_by_field(tmp_path):
    said = info()
    cadence = {"log_every": 1, "eval_every": 2, "checkpoint_every": 5, "keep_checkpoints": 1}
    harmless = {"name": "other", "engine": {"name": "deepspeed"}, "train": {"micro_batches": 2} | cadence}
    harmless["data"] = {"backend": "torchvision"}
    require_same_recipe(Recipe.model_validate(harmless), said, tmp_path)
    with pytest.raises(UserError, match=r"of another recipe: optim.lr 0.01 -> 0.5"):
        require_same_recipe(Recipe.model_validate({"optim": {"lr": 0.5}}), said, tmp_path)
    with pytest.raises(UserError, match=r"of another model: model.backbone 'resnet101' -> 'resnet18'"):
        require_same_recipe(Recipe.model_validate({"model": {"backbone": "resnet18"}}), said, tmp_path)


def test_a_checkpoint_of_before_a_field_was_known_resumes(tmp_path):
    """What an older version did not know was as the default is now."""
    older = Recipe().model_dump()
    del older["distill"], older["data"]["views"], older["data"]["backend"]
    del older["optim"]["freeze"], older["optim"]["freeze_epochs"]
    older["optim"]["freeze_backbone_epochs"] = 2
    write_checkpoint(tmp_path / "x", state(), CheckpointInfo(3, older, "hash", ("a", "b")))
    said = read_checkpoint(tmp_path / "x")[1]
    assert said.recipe == older
    frozen = {"optim": {"freeze": "backbone", "freeze_epochs": 2}}
    require_same_recipe(Recipe.model_validate(frozen), said, tmp_path)
    changed = Recipe.model_validate(frozen | {"data": {"views": 4}, "distill": {"alpha": 0.9}})
    with pytest.raises(UserError, match=r"of another recipe: data\.views None -> 4, distill\.alpha 0\.5 -> 0\.9;"):
        require_same_recipe(changed, said, tmp_path)


def test_a_checkpoint_with_a_field_that_nobody_knows_is_of_another_recipe(tmp_path):
    newer = Recipe().model_dump()
    newer["optim"]["tomorrow"] = 1
    write_checkpoint(tmp_path / "x", state(), CheckpointInfo(3, newer, "hash", ("a", "b")))
    with pytest.raises(UserError, match=r"of another recipe: optim\.tomorrow 1 -> None;"):
        require_same_recipe(Recipe(), read_checkpoint(tmp_path / "x")[1], tmp_path)


def test_what_a_recipe_leaves_to_the_network_was_settled_when_the_run_began(tmp_path):
    half = {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    settled = Recipe.model_validate({"data": half | {"std": (0.5, 0.5, 0.5)}})
    write_checkpoint(tmp_path / "x", state(), CheckpointInfo(3, settled.model_dump(), "hash", ("a", "b")))
    said = read_checkpoint(tmp_path / "x")[1]
    assert said.preprocessing == settled.data.preprocessing
    require_same_recipe(Recipe(), said, tmp_path)
    require_same_recipe(Recipe.model_validate({"data": half}), said, tmp_path)

    older = Recipe().model_dump()
    for name in ("mean", "std", "interpolation"):
        del older["data"][name]
    before = CheckpointInfo(3, older, "hash", ("a", "b"))
    require_same_recipe(Recipe.model_validate({"data": IMAGENET.model_dump()}), before, tmp_path)
    with pytest.raises(
        UserError, match=r"data\.interpolation 'bilinear' -> 'bicubic', data\.mean \(0\.485, .* -> \(0\.5"
    ):
        require_same_recipe(Recipe.model_validate({"data": half}), before, tmp_path)


def test_a_field_that_this_version_does_not_know_is_refused(tmp_path):
    newer = Recipe().model_dump()
    newer["data"]["mixup"] = 0.2
    with pytest.raises(UserError, match=r"of another recipe: data\.mixup 0\.2 -> None"):
        require_same_recipe(Recipe(), CheckpointInfo(3, newer, "hash", ("a", "b")), tmp_path)


def test_where_soft_labels_come_from_may_change_but_not_whose_they_are(tmp_path):
    def distilling(**values) -> Recipe:
        return Recipe.model_validate({"task": "distill", "data": {"views": 4}, "distill": values})

    said = CheckpointInfo(3, distilling(teacher="a", teacher_sha256="1234").model_dump(), "hash", ("a", "b"))
    moved = distilling(teacher="b", teacher_sha256="1234", teacher_mode="online", bank="elsewhere")
    require_same_recipe(moved, said, tmp_path)
    for changed in ({"teacher_sha256": "5678"}, {"teacher_sha256": "1234", "temperature": 3.0}):
        with pytest.raises(UserError, match=r"of another recipe: distill\.te\w+ \S+ -> "):
            require_same_recipe(distilling(**changed), said, tmp_path)


def test_full_disk_leaves_what_was_there(tmp_path):
    """A process whose files may not grow past 64 KiB meets the error of a full disk in the middle of a write."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from test_checkpoint import CheckpointFolder, info, state
from fpcn_dist.recipe import command_line
folder = CheckpointFolder(Path({str(tmp_path)!r}), keep=1)
folder.save(state(1), info(1), best=True)
folder.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
folder.save(state(2, size=100_000), info(2), best=False)
command_line.run(folder.wait)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr and "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == [BEST, "step-00000001.safetensors"]
    assert read_checkpoint(tmp_path / BEST)[1].step == 1


def test_a_slow_disk_holds_training_up_only_where_it_is_slower_than_the_steps_between(tmp_path, monkeypatch):
    def slowly(*args) -> None:
        time.sleep(0.5)
        write_checkpoint(*args)

    monkeypatch.setattr("fpcn_dist.runs.checkpoint.write_checkpoint", slowly)
    with CheckpointFolder(tmp_path, keep=2) as folder:
        stalls = []
        for step, pause in ((1, 0.0), (2, 0.7), (3, 0.0)):
            time.sleep(pause)
            began = time.perf_counter()
            folder.save(state(step), info(step), best=False)
            stalls.append(time.perf_counter() - began)
        # The third finds the second still on its way.
        assert stalls[0] < 0.25 and stalls[1] < 0.25 and 0.25 < stalls[2] < 2
    assert folder.steps() == [2, 3]


def test_a_writer_that_is_killed_leaves_the_last_checkpoint_whole(tmp_path):
    program = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
import test_checkpoint as t
folder = t.CheckpointFolder(Path({str(tmp_path)!r}), keep=3)
folder.save(t.state(1), t.info(1), best=True)
folder.wait()
os.replace = lambda *_: os._exit(9)  # the disk has the data, but not the name
folder.save(t.state(2), t.info(2), best=True)
folder.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    folder = CheckpointFolder(tmp_path, keep=3)
    assert path_of(folder.newest()) == folder.path(1)
    assert read_checkpoint(tmp_path / BEST)[1].step == 1


def test_a_run_grows_by_extend_alone(tmp_path):
    said = info()
    longer = Recipe.model_validate({"train": {"epochs": 200}})
    with pytest.raises(UserError, match=r"of another recipe: train.epochs 100 -> 200; add --extend"):
        require_same_recipe(longer, said, tmp_path)
    require_same_recipe(longer, said, tmp_path, extend=True)
    for changed in ({"train": {"epochs": 50}}, {"train": {"epochs": 200}, "optim": {"lr": 0.5}}):
        with pytest.raises(UserError, match="use the recipe that the run started with"):
            require_same_recipe(Recipe.model_validate(changed), said, tmp_path, extend=True)
