"""The soft-label bank: the teacher's very numbers, whoever wrote them and however often they were interrupted."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.recipe.preprocessing import IMAGENET
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.training.loop import train
from fpcn_dist.training.soft_labels.bank import SoftLabelBank, prepare_bank
from fpcn_dist.training.soft_labels.teacher import Teacher, name_teacher, open_teacher
from tests.helpers.distilling import ALONE, CPU, make_teacher, recipe
from tests.helpers.launching import ROOT, environment, losses

FILES = {"bank.json", "logits.f32", "written"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bank")


@pytest.fixture(scope="module")
def chosen(folder) -> Recipe:
    """42 images x 3 views in chunks of 12: the eleventh and last is half full."""
    return name_teacher(recipe(distill={"teacher": str(make_teacher(folder / "teacher"))}, data={"views": 3}))


@pytest.fixture(scope="module")
def manifest(rocks, chosen) -> Manifest:
    return build_manifest(rocks, chosen.data, chosen.seed)


@pytest.fixture(scope="module")
def teacher(chosen, manifest) -> Teacher:
    return open_teacher(chosen, manifest, CPU)


@pytest.fixture(scope="module")
def whole(folder, chosen, manifest, teacher) -> SoftLabelBank:
    """Written in one go."""
    bank = prepare_bank(folder / "whole", chosen, manifest)
    bank.write(teacher, share=0, shares=1, device=CPU)
    return bank


class Counting:
    """A teacher that notes how many batches it has seen, and kills its process at the ``fatal``-th."""

    def __init__(self, teacher: Teacher, fatal: int | None = None) -> None:
        self.teacher, self.fatal, self.batches = teacher, fatal, 0
        self.sizes: set[int] = set()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        self.sizes.add(len(images))
        if self.batches == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.teacher(images)


def content(bank: SoftLabelBank) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bank.folder.iterdir()}


def test_logits_are_those_of_the_teacher_in_the_step_bit_for_bit(chosen, manifest, teacher, whole):
    loader = TrainLoader(manifest, chosen.data, chosen.seed, rank=0, world_size=1, device=CPU, soft_labels=whole)
    seen = set()
    for batch in islice(loader, 18):
        assert batch.teacher_logits.dtype == torch.float32
        assert torch.equal(batch.teacher_logits, teacher(batch.images))
        seen |= set(zip(batch.image_ids.tolist(), batch.view_ids.tolist(), strict=True))
    last_images = whole.ids[-2:].tolist()  # their views are the last chunk, which is half full
    assert {view for _, view in seen} == {0, 1, 2} and seen & {(i, v) for i in last_images for v in range(3)}
    assert whole.shape == (42, 3, 3) and whole.chunks == 11 and whole.missing() == 0
    assert whole(whole.ids, whole.ids * 0).std(axis=0).min() > 1e-3  # the images do differ


@pytest.mark.parametrize("shares", [2, 3])
def test_any_number_of_writers_leave_the_same_bytes(tmp_path, chosen, manifest, teacher, whole, shares):
    prepare_bank(tmp_path / "bank", chosen, manifest)
    for share in reversed(range(shares)):
        bank, counting = SoftLabelBank(tmp_path / "bank", chosen, manifest), Counting(teacher)
        missing = bank.missing()
        bank.write(counting, share=share, shares=shares, device=CPU)
        assert missing - bank.missing() == counting.batches == len(range(share, 11, shares))
        assert counting.sizes == {12}  # as in a step: elsewhere, rounding depends on it
    assert content(bank) == content(whole)


@pytest.mark.slow
def test_a_killed_writer_is_resumed_by_others_and_nothing_is_computed_twice(
    tmp_path, rocks, chosen, manifest, teacher, whole
):
    program = f"""
import sys
from pathlib import Path
from fpcn_dist.training.soft_labels.bank import prepare_bank
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.training.soft_labels.teacher import open_teacher
from tests.training.soft_labels.test_bank import CPU, Counting
recipe = Recipe.model_validate_json({chosen.model_dump_json()!r})
manifest = Manifest.load(Path({str(tmp_path / "manifest.json")!r}))
bank = prepare_bank(Path({str(tmp_path / "bank")!r}), recipe, manifest)
bank.write(Counting(open_teacher(recipe, manifest, CPU), fatal=5), share=0, shares=1, device=CPU)
"""
    manifest.save(tmp_path / "manifest.json")
    env = environment() | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    bank = prepare_bank(tmp_path / "bank", chosen, manifest)
    assert bank.missing() == 11 - 4
    computed = []
    for share in range(2):
        counting = Counting(teacher)
        SoftLabelBank(bank.folder, chosen, manifest).write(counting, share=share, shares=2, device=CPU)
        computed.append(counting.batches)
    assert computed == [4, 3]  # chunks 4 to 10
    assert content(bank) == content(whole)
    bank.write(counting, share=0, shares=1, device=CPU)
    assert counting.batches == 3


def test_a_bank_trains_as_the_teacher_itself(folder, rocks, chosen):
    chosen = chosen.changed(**{"train.epochs": 4})  # a view again
    train(chosen, rocks, folder / "by bank", ALONE)
    train(chosen.changed(**{"distill.teacher_mode": "online"}), rocks, folder / "online", ALONE)
    assert losses(folder / "by bank") == losses(folder / "online")
    weights = [(folder / run / "model.safetensors").read_bytes() for run in ("by bank", "online")]
    assert weights[0] == weights[1]
    assert {path.name for path in (folder / "by bank/bank").iterdir()} == FILES
    assert not (folder / "online/bank").exists()
    assert RunFolder(folder / "by bank").read_outcome() == ("finished", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"data": {"views": 4}}, "views 3 instead of 4"),
        ({"data": {"crop": 24}}, "crop 32 instead of 24"),
        ({"data": {"resize": 48}}, "resize 40 instead of 48"),
        ({"data": {"flip": False}}, "flip True instead of False"),
        ({"data": {"fit": "pad"}}, "fit squeeze instead of pad"),
        ({"data": {"augment": {"hue": 0.1}}}, "augment.hue 0.0 instead of 0.1"),
        ({"train": {"precision": "bf16"}}, "precision fp32 instead of bf16"),
        ({"data": {"interpolation": "bicubic"}}, "interpolation bilinear instead of bicubic"),
        ({"data": {"mean": (0.5, 0.5, 0.5)}}, r"mean \(0\.485, 0\.456, 0\.406\) instead of \(0\.5, 0\.5, 0\.5\)"),
        ({"distill": {"teacher_sha256": "0" * 64}}, "teacher [0-9a-f]{16} instead of 0000000000000000"),
        ({"data": {"crop": 24}, "seed": 1}, "seed 0 instead of 1, crop 32 instead of 24"),
    ],
    ids=str,
)
def test_the_bank_of_something_else_is_refused(chosen, manifest, whole, change, words):
    before = content(whole)
    values = chosen.model_dump()
    for name, section in change.items():
        values[name] = values[name] | section if isinstance(section, dict) else section
    with pytest.raises(UserError, match=rf"{whole.folder}: holds the logits of something else \({words}\); remove"):
        prepare_bank(whole.folder, Recipe.model_validate(values), manifest)
    assert content(whole) == before


def test_a_bank_of_before_others_were_known_is_of_images_as_for_imagenet(tmp_path, chosen, manifest):
    prepare_bank(tmp_path, chosen, manifest)
    said = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({k: v for k, v in said.items() if k not in IMAGENET.model_dump()}))
    assert prepare_bank(tmp_path, chosen.with_preprocessing(IMAGENET), manifest).missing() == 11
    with pytest.raises(UserError, match=r"\(std \(0\.229, 0\.224, 0\.225\) instead of \(1\.0, 1\.0, 1\.0\)\)"):
        prepare_bank(tmp_path, chosen.changed(**{"data.std": (1, 1, 1)}), manifest)


def test_the_bank_of_other_images_is_refused(chosen, manifest, whole):
    fewer = dataclasses.replace(manifest, images=manifest.images[1:])
    with pytest.raises(UserError, match=rf"\(manifest {manifest.hash[:16]} instead of {fewer.hash[:16]}\)"):
        prepare_bank(whole.folder, chosen, fewer)


def test_what_does_not_change_the_logits_does_not_change_the_bank(chosen, manifest, whole):
    """Every temperature, alpha, student and engine shares it."""
    values = chosen.model_dump()
    values["distill"] |= {"temperature": 7.0, "alpha": 0.1, "teacher": "elsewhere"}
    values["model"] |= {"backbone": "resnet34"}
    values["engine"] |= {"name": "deepspeed"}
    assert prepare_bank(whole.folder, Recipe.model_validate(values), manifest).missing() == 0


def test_a_bank_from_before_there_were_fits_and_augmentations_is_taken(tmp_path, chosen, manifest):
    prepare_bank(tmp_path, chosen, manifest)
    said = json.loads((tmp_path / "bank.json").read_text())
    known = {name: value for name, value in said.items() if name != "fit" and not name.startswith("augment.")}
    assert len(known) < len(said) - 5
    (tmp_path / "bank.json").write_text(json.dumps(known))
    assert prepare_bank(tmp_path, chosen, manifest).missing() == 11
    with pytest.raises(UserError, match="fit squeeze instead of short_side"):
        prepare_bank(tmp_path, chosen.changed(**{"data.fit": "short_side"}), manifest)


@pytest.mark.parametrize("text", ["", "logits", "[]", "{}", '{"chunk": "12"}'])
def test_a_damaged_description_is_refused(tmp_path, chosen, manifest, text):
    prepare_bank(tmp_path, chosen, manifest)
    (tmp_path / "bank.json").write_text(text)
    with pytest.raises(UserError, match=r"bank\.json: is not the description of a bank"):
        prepare_bank(tmp_path, chosen, manifest)


@pytest.mark.parametrize("name", ["logits.f32", "written"])
@pytest.mark.parametrize("how", ["short", "long", "gone"])
def test_files_of_another_size_are_refused(tmp_path, chosen, manifest, name, how):
    prepare_bank(tmp_path, chosen, manifest)
    path = tmp_path / name
    size = path.stat().st_size
    path.unlink() if how == "gone" else os.truncate(path, size + (1 if how == "long" else -1))
    with pytest.raises(UserError, match=rf"{name}: is missing or has not its size; remove the folder"):
        prepare_bank(tmp_path, chosen, manifest)


@pytest.mark.parametrize("fits", [0, 1], ids=["nothing fits", "the logits fit"])
def test_a_disk_that_is_too_full_is_found_at_once(tmp_path, monkeypatch, chosen, manifest, fits):
    claimed, allocate = [], os.posix_fallocate

    def fill_up(*args) -> None:
        if len(claimed) == fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        claimed.append(args)
        allocate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fill_up)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free some space"):
            prepare_bank(tmp_path / "bank", chosen, manifest)
    assert list((tmp_path / "bank").iterdir()) == []
    assert prepare_bank(tmp_path / "bank", chosen, manifest).missing() == 11


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk")
@pytest.mark.parametrize("views", [3000, 2060], ids=["the logits do not fit", "the description does not fit"])
def test_a_real_disk_that_is_too_full(tmp_path, chosen, manifest, views):
    """Of 1 MiB: 2060 views take 256 pages of 4 KiB with the byte for each chunk."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a disk")
    try:
        larger = chosen.changed(**{"data.views": views})
        with pytest.raises(UserError, match=r"be written \(No space left on device\); free some space"):
            prepare_bank(tmp_path / "bank", larger, manifest)
        assert list((tmp_path / "bank").iterdir()) == []
        assert prepare_bank(tmp_path / "bank", chosen, manifest).missing() == 11
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_fails_later_marks_nothing_that_is_not_there(
    tmp_path, monkeypatch, chosen, manifest, teacher, whole
):
    bank, write = prepare_bank(tmp_path / "bank", chosen, manifest), os.pwrite

    def fail(file: int, data: bytes, offset: int) -> int:
        if offset >= 4 * 12 * 3 * 4:  # the logits of chunk 4
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(UserError, match=r"bank: cannot be written \(Input/output error\)"):
            bank.write(teacher, share=0, shares=1, device=CPU)
    assert list((bank.folder / "written").read_bytes()) == [1] * 4 + [0] * 7
    bank.write(teacher, share=0, shares=1, device=CPU)
    assert content(bank) == content(whole)


def test_a_folder_that_is_a_file_is_refused(tmp_path, chosen, manifest):
    (tmp_path / "bank").write_text("mine")
    with pytest.raises(UserError, match=r"bank: cannot be written \(File exists\)"):
        prepare_bank(tmp_path / "bank", chosen, manifest)
    assert (tmp_path / "bank").read_text() == "mine"


def test_the_description_says_what_the_logits_are_of(chosen, manifest, whole):
    said = json.loads((whole.folder / "bank.json").read_text())
    assert said["manifest"] == manifest.hash and said["teacher"] == chosen.distill.teacher_sha256
    assert (said["seed"], said["views"], said["resize"], said["crop"], said["chunk"]) == (0, 3, 40, 32, 12)
