"""The start of a training: where its weights come from, and what is read for it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.models import build_backbone, weights
from fpcn_dist.runs import checkpoint
from fpcn_dist.runs.checkpoint import CheckpointFolder, CheckpointInfo, TrainingState
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runtime.ranks import connect
from fpcn_dist.training.loop import train
from fpcn_dist.training.start import begin_run, prepare_data, settle_start
from tests.helpers.distilling import ALONE, recipe
from tests.helpers.forked import start_ranks
from tests.helpers.launching import free_port, losses


def test_pretrained_weights_are_fetched_for_the_first_step_alone(tmp_path, rocks, monkeypatch):
    """Neither the thaw of the backbone nor a resumed run needs them."""
    published = tmp_path / "published.pth"
    torch.save(build_backbone("test_resnet").net.state_dict(), published)
    chosen = recipe(
        "classify",
        model={"pretrained": str(published)},
        optim={"freeze": "backbone", "freeze_epochs": 1},
        train={"keep_checkpoints": 9},
    )
    fetched, fetch = [], weights.load_file
    monkeypatch.setattr(weights, "load_file", lambda *args, **options: fetched.append(fetch(*args, **options)))
    run = RunFolder(tmp_path / "run")
    train(chosen, rocks, run.path, ALONE)
    expected = losses(run.path)
    assert len(fetched) == 1

    published.unlink()
    for late in (5, 6):
        (run.checkpoints / f"step-{late:08d}.safetensors").unlink(missing_ok=True)
    train(chosen, rocks, run.path, ALONE)
    assert len(fetched) == 1 and losses(run.path) == expected
    assert run.open()[0].model.pretrained == str(published)


def start_on_a_rank(rank: int, port: int, folder: Path, data: Path) -> None:
    """Whole checkpoints of steps 1 (the best) and 2, and a damaged one of step 3."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    read, verify = [], checkpoint._checksum
    checkpoint._checksum = lambda tensors: (read.append(list(tensors)), verify(tensors))[1]
    with connect() as ranks:
        manifest = prepare_data(data, recipe("classify"), ranks)
        assert manifest == build_manifest(data.resolve(), recipe("classify").data, 0)
        start = settle_start(RunFolder(folder), recipe("classify"), manifest, ranks)
        assert start.state is not None and start.step == start.state.step == 2 and start.best == (1, 0.75)
        # The first looks at the best, too, which is damaged unnoticed otherwise.
        assert start.state.weights["w"].item() == 2 and read == [["weights/w"]] * (2 if rank == 0 else 1)


def test_each_rank_reads_one_checkpoint_once(tmp_path, rocks):
    chosen = recipe("classify")
    manifest = prepare_data(rocks, chosen, ALONE)
    run = RunFolder(tmp_path / "run")
    start = settle_start(run, chosen, manifest, ALONE)
    assert start.state is None and not run.path.exists()
    run.create()
    begin_run(run, start, manifest, ALONE)
    with CheckpointFolder(run.checkpoints, keep=3) as checkpoints:
        for step, accuracy in ((1, 0.75), (2, None), (3, None)):
            info = CheckpointInfo(step, chosen.model_dump(), manifest.hash, manifest.classes, accuracy)
            checkpoints.save(TrainingState(step, {"w": torch.tensor(step)}), info, best=step == 1)
    checkpoints.path(3).write_bytes(b"")
    start_ranks(start_on_a_rank, free_port(), run.path, rocks, ranks=2)
