"""The compared systems as the tests build them: their tasks on a few synthetic photographs."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.recipe.schema import Recipe
from tests.helpers.launching import ROOT

SYSTEMS = sorted(path.stem for path in (ROOT / "launch/recipes/compared").glob("*.yaml"))
CROP, CLASSES, IMAGES = 64, 3, 4
SMALLER = {"bilinear_cnn": "resnet18", "api_net": "resnet18", "mmal_net": "resnet18", "pca_net": "resnet50"}
"""Backbones in place of larger ones."""


def recipe(system: str, **sections: dict[str, object]) -> Recipe:
    """Give the published recipe on small images and without pretrained weights, other fields as ``sections`` say."""
    values = yaml.safe_load((ROOT / f"launch/recipes/compared/{system}.yaml").read_text())
    values["model"] |= {"pretrained": False, "backbone": SMALLER.get(system, values["model"]["backbone"])}
    values["data"] = {"resize": CROP + 8, "crop": CROP, "threads": 1}
    values["data"] |= {"classes_per_batch": None, "images_per_class": IMAGES}
    values["train"] = {}
    if "num_pairs" in values.get("contrast", {}):
        values["contrast"]["num_pairs"] = None
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Recipe.model_validate(values)


def batch(rocks: Path, chosen: Recipe) -> Batch:
    """Give the first training batch of the recipe ``chosen`` on a folder of photographs."""
    manifest = build_manifest(rocks, chosen.data, 0)
    loader = TrainLoader(manifest, chosen.data, 0, rank=0, world_size=1, device=torch.device("cpu"))
    first = next(loader)
    loader.close()
    return first
