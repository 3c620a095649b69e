"""What a network makes of every photograph, computed once: pooled vectors for heads, maps for the last stage.

Legend: N photographs, V views, C channels, h x w cells of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors import safe_open
from torch import Tensor

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import EvalLoader, ViewLoader
from fpcn_dist.deploy.onnx_backbone import frozen_features
from fpcn_dist.models import FPCN, build_model
from fpcn_dist.models.fpcn import region_name
from fpcn_dist.models.modes import evaluating
from fpcn_dist.recipe.schema import ModelConfig, Recipe
from fpcn_dist.runtime.files import write_tensors
from fpcn_dist.studies.crossval.stages import split_last_stage
from fpcn_dist.training.feature_bank.encoder import Encoder

POOLED, MAPS = "pooled.safetensors", "maps.safetensors"
_CPU = torch.device("cpu")


def pooled_of(folder: Path, region: str) -> tuple[Tensor, Tensor]:
    """The pooled vectors of a region: [N, V, C] of the training views, and [N, C] of the central views."""
    with safe_open(folder / POOLED, "pt") as file:
        return file.get_tensor(f"{region}, views"), file.get_tensor(f"{region}, centre")


def maps_of(folder: Path) -> tuple[Tensor, Tensor]:
    """What the last stage is shown, in float16: [N, V, C, h, w] of the training views, [N, C, h, w] of the central."""
    with safe_open(folder / MAPS, "pt") as file:
        return file.get_tensor("views"), file.get_tensor("centre")


def write_pooled(folder: Path, recipe: Recipe, manifest: Manifest, regions: Sequence[ModelConfig]) -> None:
    """Write the pooled vectors of each region, at one pass over the backbone; none where they are there already."""
    if (folder / POOLED).is_file():
        return
    model = _network(recipe, manifest)
    maps = frozen_features(model.backbone, _CPU, recipe.data.threads)
    encode = Encoder(model, regions, precision="fp32", maps=lambda images: (maps(images), None))
    views, centre = _looked_at(encode, recipe, manifest)
    tensors = {}
    for table, kind in ((views, "views"), (centre, "centre")):
        columns = table.unflatten(-1, (len(regions), -1))[..., :-1]  # the last column is the region's share of the map
        for region, part in zip(regions, columns.unbind(-2), strict=True):
            tensors[f"{region_name(region)}, {kind}"] = part.contiguous()
    write_tensors(folder / POOLED, tensors, {})


def write_maps(folder: Path, recipe: Recipe, manifest: Manifest) -> None:
    """Write what the last stage is shown; nothing where that is there already.

    Raises:
        UserError: see :func:`split_last_stage`.
    """
    if (folder / MAPS).is_file():
        return
    before, _ = split_last_stage(_network(recipe, manifest).backbone, recipe.data.crop)
    before = before.to(memory_format=torch.channels_last)

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad(), evaluating(before):
            return before(images.contiguous(memory_format=torch.channels_last)).half().contiguous()

    views, centre = _looked_at(encode, recipe, manifest)
    write_tensors(folder / MAPS, {"views": views, "centre": centre}, {})


def _network(recipe: Recipe, manifest: Manifest) -> FPCN:
    torch.manual_seed(recipe.seed)  # of a network without weights
    model = build_model(recipe.model.changed(region="none"), len(manifest.classes), task="contrast").eval()
    assert isinstance(model, FPCN)
    return model


def _looked_at(encode: Callable[[Tensor], Tensor], recipe: Recipe, manifest: Manifest) -> tuple[Tensor, Tensor]:
    """What ``encode`` makes of all training views [N, V, ...] and of all central views [N, ...]."""
    ids, views = np.arange(len(manifest.images)), recipe.data.distinct_views
    assert views is not None, "checked by the study"
    order = ids.repeat(views), np.tile(np.arange(views), len(ids))
    drawn = ViewLoader(manifest, recipe.data, recipe.seed, *order, _CPU)
    blobs = [manifest.blob(image_id) for image_id in ids.tolist()]
    central = EvalLoader(blobs, manifest.labels, ids, recipe.data, rank=0, world_size=1, device=_CPU)

    def look(loader: EvalLoader, title: str) -> Tensor:
        return torch.cat([encode(batch.images) for batch in track(loader, title, len(loader), transient=True)])

    title = f"{recipe.model.backbone}, {{}} views"
    shown = look(drawn, title.format("training"))
    return shown.unflatten(0, (len(ids), views)), look(central, title.format("central"))
