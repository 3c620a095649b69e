"""Two gloo ranks: they write one bank in parallel, and students that share batches are as if alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runtime.ranks import connect
from fpcn_dist.training.loop import train, train_together
from fpcn_dist.training.soft_labels import attach
from fpcn_dist.training.soft_labels.teacher import Teacher, open_teacher
from tests.helpers.distilling import ALONE, make_teacher, recipe
from tests.helpers.forked import start_ranks
from tests.helpers.launching import free_port, losses

pytestmark = pytest.mark.slow

WILD = {"lr": 1e30, "warmup_epochs": 0}


def students(teacher: Path) -> dict[str, Recipe]:
    source = {"teacher": str(teacher)}
    return {
        "taught": recipe(distill=source),
        "other": recipe(distill=source | {"alpha": 0.9}, model={"norm": "batch"}, train={"log_every": 2}),
        "wild": recipe(distill=source, optim=WILD),
    }


def rank_main(rank: int, port: int, folder: Path, teacher: Path, data: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    computed = []

    def open_and_count(*args) -> Teacher:
        teacher = open_teacher(*args)
        pool = teacher.model.pool
        teacher.model.pool = lambda images: (computed.append(len(images)), pool(images))[1]
        return teacher

    attach.open_teacher = open_and_count
    chosen = students(teacher)
    with connect() as ranks:
        failures = train_together({folder / "together" / name: r for name, r in chosen.items()}, data, ranks)
        written = {path.name: path.stat().st_mtime_ns for path in (folder / "together/taught/bank").iterdir()}
        (folder / f"{rank}.json").write_text(json.dumps([computed, {run.name: why for run, why in failures.items()}]))
        with_bank = chosen["other"].changed(**{"distill.bank": str(folder / "together/taught/bank")})
        train(with_bank, data, folder / "alone", ranks)
        assert written == {path.name: path.stat().st_mtime_ns for path in (folder / "together/taught/bank").iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("over ranks")


@pytest.fixture(scope="module")
def teacher(folder) -> Path:
    return make_teacher(folder / "teacher")


@pytest.fixture(scope="module")
def single(folder, rocks, teacher) -> Iterator[Path]:
    """One process, computing with as many threads as each rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(students(teacher)["taught"], rocks, folder / "single", ALONE)
    yield folder / "single"
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ranks(folder, rocks, teacher) -> list[tuple[list[int], dict[str, str]]]:
    """What each rank's teacher computed, and which students failed there."""
    start_ranks(rank_main, free_port(), folder, teacher, rocks, ranks=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_both_write_their_share_of_one_bank(ranks, folder, single):
    """84 views in 7 chunks of 12."""
    assert [computed for computed, _ in ranks] == [[12] * 4, [12] * 3]
    banks = [run / "bank" for run in (single, folder / "together/taught")]
    for name in ("bank.json", "logits.f32", "written"):
        assert (banks[0] / name).read_bytes() == (banks[1] / name).read_bytes()
    assert not (folder / "together/other/bank").exists()


def test_a_student_is_as_if_alone_on_these_ranks(ranks, folder):
    assert len(losses(folder / "alone")) == 6
    assert losses(folder / "together/other") == pytest.approx(losses(folder / "alone"), abs=1e-6)
    for name in ("taught", "other"):
        assert RunFolder(folder / "together" / name).read_outcome() == ("finished", None)


def test_a_loss_that_runs_away_stops_its_student_on_both(ranks, folder):
    for _, failures in ranks:
        assert list(failures) == ["wild"] and "is not finite" in failures["wild"]
    assert RunFolder(folder / "together/wild").read_outcome() == ("diverged", ranks[0][1]["wild"])


@pytest.mark.slow
def test_torchrun_gives_the_losses_of_one_process_and_those_among_others(runs, ranks, folder, teacher, single):
    """The real command."""
    overrides = ["--task", "distill", "--distill.teacher", str(teacher), "--views", "2", "--train.epochs", "2"]
    run = runs.train("distilled on two ranks", *overrides, launcher="torchrun")
    assert (run / "bank/logits.f32").read_bytes() == (single / "bank/logits.f32").read_bytes()
    assert losses(run) == pytest.approx(losses(single), abs=1e-4)
    assert losses(run) == pytest.approx(losses(folder / "together/taught"), abs=1e-6)
