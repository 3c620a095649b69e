"""Students that share batches: each as if it were alone, whatever happens to the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs import checkpoint
from fpcn_dist.runs.checkpoint import read_checkpoint
from fpcn_dist.runs.evaluation import Evaluator
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.tasks import Distill
from fpcn_dist.training import loop
from fpcn_dist.training.loop import train, train_together
from tests.helpers.distilling import ALONE, make_teacher, recipe
from tests.helpers.launching import losses

pytestmark = pytest.mark.slow

SAVED_BY_STEP_3 = {"step-00000002.safetensors", "step-00000003.safetensors", "best.safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def source(folder) -> dict[str, str]:
    """Whose soft labels: one bank for all runs of this module."""
    return {"teacher": str(make_teacher(folder / "teacher")), "bank": str(folder / "bank")}


@pytest.fixture(scope="module")
def students(source) -> dict[str, Recipe]:
    """As different as they may be, one of them without a teacher."""
    return {
        "gentle": recipe(distill=source | {"alpha": 0.2}, optim={"ema_decay": 0.9}),
        "strict": recipe(
            distill=source | {"alpha": 0.9, "temperature": 4.0},
            model={"norm": "batch"},
            optim={"name": "adamw", "freeze": "backbone", "freeze_epochs": 1},
            train={"micro_batches": 2},
        ),
        "baseline": recipe("classify", train={"log_every": 2}),
    }


@pytest.fixture(scope="module")
def alone(folder, rocks, students) -> dict[str, Path]:
    runs = {name: folder / "alone" / name for name in students}
    for name, output in runs.items():
        train(students[name], rocks, output, ALONE)
    return runs


@pytest.fixture(scope="module")
def together(folder, rocks, students) -> dict[str, Path]:
    runs = {name: folder / "together" / name for name in students}
    assert train_together({runs[name]: student for name, student in students.items()}, rocks, ALONE) == {}
    return runs


def assert_same(runs: dict[str, Path], expected: dict[str, Path]) -> None:
    for name, run in runs.items():
        assert losses(run) == losses(expected[name]) and len(losses(run)) == 6, name
        assert (run / "model.safetensors").read_bytes() == (expected[name] / "model.safetensors").read_bytes(), name
        assert RunFolder(run).read_outcome() == ("finished", None)


def test_each_is_as_if_alone(alone, together):
    assert_same(together, alone)
    assert len({tuple(losses(run)) for run in together.values()}) == 3
    for name, run in together.items():
        assert {p.name for p in (run / "checkpoints").iterdir()} == {
            p.name for p in (alone[name] / "checkpoints").iterdir()
        }
        scores = [json.loads((r / "evaluation.json").read_text()) for r in (run, alone[name])]
        assert scores[0] == scores[1]


def test_a_backbone_that_is_frozen_at_first_thaws(together):
    """Of the strict student alone, in the first of the two epochs of 3 steps."""

    def first_layer(name: str, step: int) -> torch.Tensor:
        weights = read_checkpoint(together[name] / f"checkpoints/step-{step:08d}.safetensors")[0].weights
        return weights[next(key for key in weights if key.endswith("conv1.weight"))]

    assert torch.equal(first_layer("strict", 2), first_layer("strict", 3))
    assert not torch.equal(first_layer("strict", 3), first_layer("strict", 6))
    assert not torch.equal(first_layer("gentle", 2), first_layer("gentle", 3))


def test_the_teacher_in_the_step_serves_all(tmp_path, rocks, students, alone):
    recipes = {}
    for name in ("gentle", "strict"):
        recipes[tmp_path / name] = students[name].changed(**{"distill.teacher_mode": "online"})
    assert train_together(recipes, rocks, ALONE) == {}
    assert_same({run.name: run for run in recipes}, alone)


def break_at_step_3(monkeypatch) -> None:
    """The gentle student fails in its fourth step."""
    whole = Distill.criterion

    def criterion(self, pooled, batch, step):
        if step == 3 and self.recipe.distill.alpha == 0.2:
            raise RuntimeError("out of luck")
        return whole(self, pooled, batch, step)

    monkeypatch.setattr(Distill, "criterion", criterion)


def test_those_that_fail_are_named_and_the_others_go_on(tmp_path, rocks, students, alone, source, monkeypatch):
    wild = recipe(distill=source, optim={"lr": 1e30, "warmup_epochs": 0})
    runs = {name: tmp_path / name for name in ("wild", "gentle", "strict")}
    with monkeypatch.context() as patch:
        break_at_step_3(patch)
        failures = train_together({runs[name]: (students | {"wild": wild})[name] for name in runs}, rocks, ALONE)
    assert list(failures) == [runs["wild"], runs["gentle"]]
    assert failures[runs["gentle"]] == "RuntimeError: out of luck"
    assert failures[runs["wild"]].startswith("loss at step ") and "is not finite (loss " in failures[runs["wild"]]
    assert "lower optim.lr; there is no checkpoint yet" in failures[runs["wild"]]
    for run, reason in failures.items():
        assert RunFolder(run).read_outcome() == ("diverged" if run == runs["wild"] else "failed", reason)
        assert len(losses(run)) < 6 and not (run / "model.safetensors").exists()
    assert_same({"strict": runs["strict"]}, alone)

    # Whatever was wrong with the gentle one is mended: it goes on from its own checkpoint, of step 3.
    again = {runs[name]: students[name] for name in ("strict", "gentle")}
    assert train_together(again, rocks, ALONE) == {}
    assert_same({name: runs[name] for name in ("strict", "gentle")}, alone)


def test_a_checkpoint_that_cannot_be_written_ends_its_student_alone(tmp_path, rocks, source, monkeypatch):
    """The very last one, which is still being written when the steps are over."""
    whole = checkpoint.write_checkpoint

    def write(path: Path, state, info) -> None:
        if "unlucky" in path.parts and info.step == 3:
            raise UserError("file", path, "could not be written (No space left on device)", "free some space")
        whole(path, state, info)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    recipes = {tmp_path / name: recipe("classify", train={"epochs": 1}) for name in ("unlucky", "lucky")}
    failures = train_together(recipes, rocks, ALONE)
    assert list(failures) == [tmp_path / "unlucky"] and "No space left on device" in failures[tmp_path / "unlucky"]
    assert RunFolder(tmp_path / "unlucky").read_outcome()[0] == "failed"
    assert RunFolder(tmp_path / "lucky").read_outcome() == ("finished", None)


def test_a_file_that_turns_bad_is_in_the_records_of_all(tmp_path, rocks, monkeypatch):
    """However often each of them logs."""
    data = tmp_path / "rocks"
    shutil.copytree(rocks, data)
    recipes = {
        tmp_path / name: recipe("classify", train={"log_every": every, "checkpoint_every": 6, "eval_every": 2})
        for name, every in (("often", 1), ("seldom", 5))
    }
    attach = loop.attach_teacher

    def damage_and_attach(chosen, output, manifest, ranks):
        first = Path(str(manifest.blob(int(manifest.ids("train")[0]))))
        first.write_bytes(first.read_bytes()[:-200])
        return attach(chosen, output, manifest, ranks)

    monkeypatch.setattr(loop, "attach_teacher", damage_and_attach)
    assert train_together(recipes, data, ALONE) == {}
    replaced = [[e for e in read_metrics(run) if e["kind"] == "replaced"] for run in recipes]
    assert [len(entries) for entries in replaced] == [1, 1]
    assert replaced[0][0]["path"] == replaced[1][0]["path"] and replaced[0][0]["step"] < replaced[1][0]["step"] == 5


def test_validation_images_are_decoded_once_for_all(tmp_path, rocks, monkeypatch):
    decoded, every_batch = [], EvalLoader.__iter__

    def counting(self):
        for batch in every_batch(self):
            decoded.append(len(batch.labels))
            yield batch

    monkeypatch.setattr(EvalLoader, "__iter__", counting)
    monkeypatch.setattr(loop, "finish_run", lambda *_, **__: None)  # which evaluates each again
    recipes = {tmp_path / name: recipe("classify", train={"epochs": 1}) for name in ("a", "b")}
    assert train_together(recipes, rocks, ALONE) == {}
    images = len(RunFolder(tmp_path / "a").open()[1].ids("val"))
    evaluations = [[e for e in read_metrics(run) if e["kind"] == "eval"] for run in recipes]
    assert len(evaluations[0]) == len(evaluations[1]) > 0
    assert sum(decoded) == images * len(evaluations[0])


def test_one_that_fails_in_validation_leaves_the_others_alone(tmp_path, rocks, alone, students, monkeypatch):
    whole = Evaluator.update

    def update(self, batch):
        if self.precision == "bf16":
            raise RuntimeError("out of luck")
        whole(self, batch)

    monkeypatch.setattr(Evaluator, "update", update)
    unlucky = recipe("classify", train={"precision": "bf16"})
    recipes = {tmp_path / "unlucky": unlucky, tmp_path / "baseline": students["baseline"]}
    assert train_together(recipes, rocks, ALONE) == {tmp_path / "unlucky": "RuntimeError: out of luck"}
    assert_same({"baseline": tmp_path / "baseline"}, alone)


def test_when_all_fail_the_rest_of_the_steps_is_left_out(tmp_path, rocks, source, monkeypatch):
    break_at_step_3(monkeypatch)
    recipes = {tmp_path / name: recipe(distill=source | {"alpha": 0.2}, train={"epochs": 10**6}) for name in ("a", "b")}
    assert list(train_together(recipes, rocks, ALONE)) == list(recipes)


def test_a_single_one_raises_its_error(tmp_path, rocks, source, monkeypatch):
    break_at_step_3(monkeypatch)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(recipe(distill=source | {"alpha": 0.2}), rocks, tmp_path / "run", ALONE)
    assert len(losses(tmp_path / "run")) == 3
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}  # the last one was written to its end
    assert {"step-00000002.safetensors", "step-00000003.safetensors"} <= names <= SAVED_BY_STEP_3


def test_each_goes_on_from_its_own_checkpoint(tmp_path, rocks, students, together, capsys):
    """As if they had been killed at different moments: newest checkpoints of steps 3 and 2, and none."""
    newest = {"gentle": 3, "strict": 2, "baseline": 0}
    runs = {name: tmp_path / name for name in students}
    for name, step in newest.items():
        shutil.copytree(together[name], runs[name])
        for path in (runs[name] / "checkpoints").iterdir():
            if read_checkpoint(path)[1].step > step:
                path.unlink()
    assert train_together({runs[name]: student for name, student in students.items()}, rocks, ALONE) == {}
    shown = capsys.readouterr().out
    for name, step in newest.items():
        assert (f"resuming from step {step} ({runs[name]}/" in shown) == (step > 0)
    assert_same(runs, together)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"data": {"views": 3}}, "data"),
        ({"data": {"images_per_class": 5}}, "data"),
        ({"train": {"epochs": 3}}, "train.epochs"),
        ({"train": {"precision": "bf16"}}, "train.precision"),
        ({"distill": {"teacher_mode": "online"}}, "distill.teacher"),
        ({"distill": {"bank": "elsewhere"}}, "distill.teacher"),
        ({"distill": {"teacher": "other"}}, "distill.teacher"),
    ],
    ids=str,
)
def test_recipes_that_disagree_are_refused(tmp_path, rocks, source, change, field):
    if change == {"distill": {"teacher": "other"}}:
        change = {"distill": {"teacher": str(make_teacher(tmp_path / "other", seed=1))}}
    first, second = recipe(distill=source), recipe(**{"distill": source} | change)
    if "distill" in change:
        second = recipe(distill=source | change["distill"])
    with pytest.raises(UserError) as error:
        train_together({tmp_path / "first": first, tmp_path / "second": second}, rocks, ALONE)
    assert error.value.field == field and "share" in str(error.value)
    assert not (tmp_path / "first/metrics.jsonl").exists()
