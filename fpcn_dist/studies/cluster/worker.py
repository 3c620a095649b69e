"""What runs inside the cluster's processes: a rank of a group, the cost of a step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.recipe.schema import ContrastConfig, Recipe
from fpcn_dist.runtime.ranks import own_device, use_threads
from fpcn_dist.studies.cluster.ranks import Rendezvous, describe_rank, join, write_output_to
from fpcn_dist.tasks import build_task
from fpcn_dist.training.engine.optim import build_optimizer
from fpcn_dist.training.loop import train_together

_TIMED_IMAGES = 8
_TIMED_STEPS = 3


def train_rank(
    recipes: Mapping[str, dict[str, Any]],
    manifest: str,
    *,
    rank: int,
    world_size: int,
    meeting: Rendezvous | str,
    log: str,
    node: str,
) -> dict[str, str]:
    """Train as one rank of a group; returns what :func:`train_together` does. All output goes to the file ``log``.

    Args:
        recipes: nested dictionaries, by run folder.
        manifest: file of the checked images.
        rank, world_size: this process among those of the group.
        meeting: where they meet.
        log: file to append to.
        node: what Ray calls the node that this is.
    """
    write_output_to(log)
    print(describe_rank(rank, world_size, node), flush=True)
    parsed = {Path(folder): Recipe.model_validate(values) for folder, values in recipes.items()}
    with join(rank, world_size, meeting) as ranks:
        failures = train_together(parsed, Manifest.load(Path(manifest)), ranks, probe=True)
    return {str(folder): reason for folder, reason in failures.items()}


def step_seconds(recipe: dict[str, Any], classes: int) -> float:
    """Seconds of a training step of a global batch on one place: the median of a few on fewer images, scaled up."""
    parsed, device = Recipe.model_validate(recipe), own_device()
    use_threads(parsed.data.threads, device)
    data = parsed.data
    batch_size = data.batch_size(classes)
    images = min(_TIMED_IMAGES, batch_size)
    # Weights that a file or a hub would give do not change the cost; which pairs are taken hardly does, and their count
    # is that of the whole batch.
    untrained = parsed.changed(**{"model.pretrained": False, "contrast": _any_pairs(parsed)})
    task = build_task(untrained, classes, images=images).to(device).train()
    optimizer = build_optimizer(parsed.optim, task)
    index = torch.arange(images, device=device)
    pixels = torch.randn(images, 3, data.crop, data.crop, device=device)
    soft = torch.zeros(images, classes, device=device)
    batch = Batch(pixels, index % classes, index, index, index.double().unsqueeze(1).expand(images, 5), soft)
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


def _any_pairs(recipe: Recipe) -> ContrastConfig:
    pairs = recipe.contrast.pairs
    if pairs == "random" and recipe.task == "contrast":
        pairs = "all"
    return recipe.contrast.changed(pairs=pairs, num_pairs=None)
