"""What runs inside the cluster's processes: a rank of a group, a share of the bank, the cost of a step."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fpcn_dist.bank import SoftLabelBank
from fpcn_dist.config import Recipe
from fpcn_dist.data.batch import Batch
from fpcn_dist.data.manifest import Manifest
from fpcn_dist.distributed import connect
from fpcn_dist.optim import build_optimizer
from fpcn_dist.tasks import build_task
from fpcn_dist.teacher import open_teacher
from fpcn_dist.train import train_together

CPU = torch.device("cpu")
_TIMED_IMAGES = 8
_TIMED_STEPS = 3


def free_address(node_ip: str) -> str:
    """HOST:PORT at which this process could be met."""
    with socket.socket() as listener:
        listener.bind((node_ip, 0))
        return f"{node_ip}:{listener.getsockname()[1]}"


def train_rank(
    recipes: Mapping[str, dict[str, Any]], data: str, *, rank: int, ranks: int, address: str, log: str, node: str
) -> dict[str, str]:
    """One rank of a group; what :func:`train_together` returns. Its output goes to the file ``log``.

    Args:
        recipes: nested dictionaries, by run folder.
        data: the image folder.
        rank, ranks: this process among those of the group.
        address: HOST:PORT where they meet.
        log: file to append to.
        node: what Ray calls the node that this is.
    """
    _write_output_to(log)
    print(f"rank {rank} of {ranks} on {socket.gethostname()}, Ray node {node}", flush=True)
    host, port = address.rsplit(":", 1)
    # Ray shows each process its own GPU and no other: for torch it is the first of one.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
    parsed = {Path(folder): Recipe.model_validate(values) for folder, values in recipes.items()}
    _use_threads(next(iter(parsed.values())))
    with connect() as connected:
        failures = train_together(parsed, Path(data), connected)
    return {str(folder): reason for folder, reason in failures.items()}


def write_share(recipe: dict[str, Any], folder: str, manifest: str, share: int, shares: int, log: str) -> None:
    """A share of the bank in ``folder``, of the images of a manifest file; see :meth:`SoftLabelBank.write`."""
    _write_output_to(log)
    parsed, images, device = Recipe.model_validate(recipe), Manifest.load(Path(manifest)), _device()
    _use_threads(parsed)
    teacher = open_teacher(parsed, images, device)
    SoftLabelBank(Path(folder), parsed, images).write(teacher, share=share, shares=shares, device=device)


def step_seconds(recipe: dict[str, Any], classes: int) -> float:
    """Seconds of a training step of a global batch on one place: the median of a few on fewer images, scaled up."""
    parsed, device = Recipe.model_validate(recipe), _device()
    _use_threads(parsed)
    data = parsed.data
    batch_size = (data.classes_per_batch or classes) * data.images_per_class
    images = min(_TIMED_IMAGES, batch_size)
    # Weights that a file or a hub would give do not change the cost.
    model = parsed.model.model_copy(update={"pretrained": False})
    task = build_task(parsed.model_copy(update={"model": model}), classes).to(device).train()
    optimizer = build_optimizer(parsed.optim, task)
    index = torch.arange(images, device=device)
    pixels = torch.randn(images, 3, data.crop, data.crop, device=device)
    soft = torch.zeros(images, classes, device=device)
    batch = Batch(pixels, index % classes, index, index, index.unsqueeze(1).expand(images, 3), soft)
    times = []
    for _ in range(1 + _TIMED_STEPS):
        start = time.perf_counter()
        task(batch, 0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[_TIMED_STEPS // 2] * batch_size / images


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def _use_threads(recipe: Recipe) -> None:
    """A process of Ray's sees all cores of its node; it may use those that it was given."""
    if recipe.data.threads is not None:
        torch.set_num_threads(recipe.data.threads)


def _write_output_to(log: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
