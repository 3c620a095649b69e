"""Distillation of tiny networks in this process, with a teacher that costs no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fpcn_dist.models import build_model
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.model_folder import save_model
from fpcn_dist.runtime.ranks import Ranks
from tests.helpers.launching import TINY

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)


def recipe(task: str = "distill", **sections: Any) -> Recipe:
    """The tiny recipe for two epochs on two views of each image; ``sections`` replace some of its fields."""
    values = yaml.safe_load(TINY) | {"task": task}
    values["data"]["views"] = 2
    values["train"]["epochs"] = 2
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return Recipe.model_validate(values)


def make_teacher(
    folder: Path, *, classes: Sequence[str] = ("basalt", "dolomite", "marble"), seed: int = 0, **sections: Any
) -> Path:
    """Export a network with random weights, and BatchNorm statistics that are not those of its beginning."""
    chosen = recipe("contrast", **sections | {"model": {"norm": "batch"}})
    torch.manual_seed(seed)
    model = build_model(chosen.model, len(classes), task=chosen.task).train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(24, 3, 32, 32))
    folder.mkdir()
    save_model(folder, model, chosen, classes)
    return folder
