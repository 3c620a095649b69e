"""The teacher only looks: nothing of it changes, and one that does not fit is refused before anything is trained."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.deploy import onnx_backbone
from fpcn_dist.recipe.reading import load_recipe
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.training.loop import train
from fpcn_dist.training.soft_labels import attach
from fpcn_dist.training.soft_labels.bank import prepare_bank
from fpcn_dist.training.soft_labels.teacher import Teacher, name_teacher, open_teacher, weights_sha256
from tests.helpers.distilling import ALONE, CPU, make_teacher, recipe
from tests.helpers.launching import losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rocks) -> Path:
    """The run of an FPCN with BatchNorm, whose running statistics would change if it were left in training mode."""
    output = tmp_path_factory.mktemp("teacher") / "trained"
    train(recipe("contrast", model={"norm": "batch"}, train={"epochs": 1}), rocks, output, ALONE)
    return output


@pytest.fixture(scope="module")
def copied(tmp_path_factory, trained) -> Path:
    """A folder with the model alone."""
    folder = tmp_path_factory.mktemp("copy") / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(trained / name, folder)
    return folder


@pytest.mark.parametrize("mode", ["bank", "online"])
def test_students_leave_the_teacher_as_it_was(tmp_path, rocks, trained, monkeypatch, capsys, mode):
    opened: list[Teacher] = []

    def open_and_note(*args) -> Teacher:
        opened.append(open_teacher(*args))
        return opened[0]

    monkeypatch.setattr(attach, "open_teacher", open_and_note)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    chosen = recipe(distill={"teacher": str(trained), "teacher_mode": mode}, model={"norm": "batch"})
    train(chosen, rocks, tmp_path / "student", ALONE)
    assert len(losses(tmp_path / "student")) == 6

    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    model, saved = opened[0].model, load_file(trained / "model.safetensors")
    assert any(name.endswith("running_mean") for name in saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())

    shown = capsys.readouterr().out
    line = f"teacher {trained}, weights sha256 {weights_sha256(trained)[:16]}, accuracy "
    assert f"{line}{100 * Evaluation.load(trained).accuracy:.1f} % of 15 test images" in shown
    assert shown.index(line) < shown.index("step 1/6")
    assert load_recipe(tmp_path / "student/recipe.yaml").distill.teacher_sha256 == weights_sha256(trained)


def test_logits_are_those_of_the_evaluation(rocks, trained):
    chosen = name_teacher(recipe(distill={"teacher": str(trained)}))
    teacher = open_teacher(chosen, build_manifest(rocks, chosen.data, 0), CPU)
    images = torch.randn(5, 3, 32, 32)
    logits = teacher(images)
    assert torch.equal(logits, teacher.model(images)) and logits.dtype == torch.float32 and not logits.requires_grad
    half = Teacher(teacher.folder, teacher.sha256, None, teacher.model, teacher.info, "bf16")(images)
    assert half.dtype == torch.float32 and not torch.equal(half, logits)
    torch.testing.assert_close(half, logits, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_a_bank_and_the_teacher_in_the_step_agree_bit_for_bit_through_onnxruntime(
    tmp_path, rocks, trained, monkeypatch, capsys
):
    online = name_teacher(recipe(distill={"teacher": str(trained), "teacher_mode": "online"}))
    manifest = build_manifest(rocks, online.data, 0)
    eager = open_teacher(online, manifest, CPU)
    views = 2 * len(manifest.ids("train"))
    monkeypatch.setattr(onnx_backbone, "WORTH_EXPORTING", views)  # of either mode
    banked = online.changed(**{"distill.teacher_mode": "bank"})
    bank = prepare_bank(tmp_path / "bank", banked, manifest)
    bank.write(open_teacher(banked, manifest, CPU), share=0, shares=1, device=CPU)
    teacher = open_teacher(online, manifest, CPU)
    for batch in islice(TrainLoader(manifest, online.data, 0, rank=0, world_size=1, device=CPU), 7):
        logits = teacher(batch.images)
        assert np.array_equal(bank(batch.image_ids.numpy(), batch.view_ids.numpy()), logits.numpy())
        torch.testing.assert_close(logits, eager(batch.images), rtol=1e-3, atol=1e-4)
    assert capsys.readouterr().out.count("frozen backbone: onnxruntime") == 2
    monkeypatch.setattr(onnx_backbone, "WORTH_EXPORTING", views + 1)
    assert not isinstance(open_teacher(online, manifest, CPU).model.backbone, onnx_backbone.FrozenBackbone)


def test_a_model_of_unknown_accuracy_teaches_too(rocks, copied):
    chosen = name_teacher(recipe(distill={"teacher": str(copied)}, seed=1))
    teacher = open_teacher(chosen, build_manifest(rocks, chosen.data, 1), CPU)
    assert str(teacher).endswith("accuracy not evaluated")


def refusal(rocks: Path, folder: Path, **sections) -> str:
    """Why a student is not trained; nothing of it is begun that would be in the way once the mistake is mended."""
    with pytest.raises(UserError) as error:
        train(recipe(**sections), rocks, folder / "student", ALONE)
    assert not (folder / "student/metrics.jsonl").exists() and not (folder / "student/bank").exists()
    return str(error.value)


@pytest.mark.parametrize("mode", ["bank", "online"])
def test_no_teacher(rocks, tmp_path, mode):
    message = refusal(rocks, tmp_path, distill={"teacher_mode": mode})
    assert message == "distill.teacher: task 'distill' needs a teacher; give --distill.teacher RUN"


@pytest.mark.parametrize("name", ["absent", "empty", "weights alone"])
def test_a_folder_without_a_model(rocks, tmp_path, copied, name):
    folder = tmp_path / name
    if name != "absent":
        folder.mkdir()
    if name == "weights alone":
        shutil.copy(copied / "model.safetensors", folder)
    message = refusal(rocks, tmp_path, distill={"teacher": str(folder), "teacher_mode": "online"})
    missing = "config.json" if name == "weights alone" else "model.safetensors"
    assert f"{folder}: holds no {missing}" in message and "training" in message


def test_other_weights_than_the_recipe_names(rocks, tmp_path, copied):
    message = refusal(rocks, tmp_path, distill={"teacher": str(copied), "teacher_sha256": "0" * 64})
    assert (
        f"its weights (sha256 {weights_sha256(copied)[:16]}) are not those that the recipe names (00000000" in message
    )


def test_other_classes(rocks, tmp_path):
    teacher = make_teacher(tmp_path / "teacher", classes=("basalt", "granite"))
    for mode in ("bank", "online"):
        message = refusal(rocks, tmp_path, distill={"teacher": str(teacher), "teacher_mode": mode})
        assert "it tells apart basalt, granite, but the data have basalt, dolomite, marble" in message


@pytest.mark.parametrize(("field", "value"), [("resize", 48), ("crop", 24)])
def test_other_sizes(rocks, tmp_path, copied, field, value):
    message = refusal(rocks, tmp_path, distill={"teacher": str(copied)}, data={field: value})
    wanted = {"resize": 40, "crop": 32}[field]
    assert f"data.{field} {value}: the teacher was trained at {wanted}" in message
    assert "give --data.resize 40 --data.crop 32" in message


def test_another_fit(rocks, tmp_path, copied):
    message = refusal(rocks, tmp_path, distill={"teacher": str(copied)}, data={"fit": "pad"})
    assert "data.fit pad: the teacher was trained with 'squeeze'" in message and "give --data.fit squeeze" in message


def test_a_teacher_that_has_seen_what_its_students_are_measured_on(rocks, tmp_path, trained):
    message = refusal(rocks, tmp_path, distill={"teacher": str(trained)}, seed=1)
    assert "it was trained on" in message and "images that its students would be measured on, such as" in message
    hint = "set seed, data.split_seed, data.val_fraction, data.test_fraction as in the teacher's recipe.yaml"
    assert hint in message


def test_another_teacher_does_not_take_over_a_run(rocks, tmp_path):
    first, second = (make_teacher(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second")))
    short = {"train": {"epochs": 1}}
    train(recipe(distill={"teacher": str(first)}, **short), rocks, tmp_path / "student", ALONE)
    before = losses(tmp_path / "student")
    with pytest.raises(UserError, match=r"holds a finished run of another recipe: distill\.teacher_sha256 '"):
        train(recipe(distill={"teacher": str(second)}, **short), rocks, tmp_path / "student", ALONE)
    shutil.move(first, tmp_path / "elsewhere")
    train(recipe(distill={"teacher": str(tmp_path / "elsewhere")}, **short), rocks, tmp_path / "student", ALONE)
    assert losses(tmp_path / "student") == before
