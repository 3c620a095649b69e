"""The run folder: what a run leaves behind, and whether a folder may be continued."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console

from fpcn_dist.checkpoint import CheckpointFolder, CheckpointInfo, read_checkpoint, require_same_recipe
from fpcn_dist.cli import dump_recipe, load_recipe
from fpcn_dist.config import Recipe
from fpcn_dist.data.manifest import Manifest, build_manifest
from fpcn_dist.data.validate import refusal_table
from fpcn_dist.distributed import Ranks
from fpcn_dist.errors import UserError
from fpcn_dist.files import write_text

_PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "deepspeed", "timm")


class RunFolder:
    """Names of what is in a run folder. Every rank reads it, the first one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.manifest = path / "manifest.json"
        self.environment = path / "environment.json"
        self.checkpoints = path / "checkpoints"

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made, or it holds files but no run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = [] if self.recipe.exists() else [p.name for p in self.path.iterdir() if p.name[0] != "."]
        except OSError as error:
            reason = f"the folder cannot be made ({error.strerror})"
            raise UserError("--output", self.path, reason, "choose another folder") from None
        if strangers:
            reason = f"the folder holds other files ({', '.join(sorted(strangers)[:3])}) and no run"
            raise UserError("--output", self.path, reason, "choose a new or empty folder")

    def describe(self, recipe: Recipe, manifest: Manifest, ranks: Ranks) -> None:
        """Write recipe, manifest and environment."""
        write_text(self.recipe, dump_recipe(recipe))
        manifest.save(self.manifest)
        write_text(self.environment, json.dumps(_environment(ranks), indent=2) + "\n")

    def open(self) -> tuple[Recipe, Manifest]:
        """Recipe and manifest of an existing run.

        Raises:
            UserError: there is no run in this folder.
        """
        if not self.recipe.is_file() or not self.manifest.is_file():
            raise UserError("RUN", self.path, "holds no run (recipe.yaml, manifest.json)", "give a folder of train.py")
        return load_recipe(self.recipe), Manifest.load(self.manifest)


def start_run(
    run: RunFolder, checkpoints: CheckpointFolder, recipe: Recipe, data: Path, ranks: Ranks, resume: str
) -> str | None:
    """Check the data, settle where to start from, and describe the run in its folder; for the first rank alone.

    Returns:
        Path of the checkpoint to resume from, or ``None`` to begin at step 0.

    Raises:
        UserError: folder, data or checkpoint cannot be used, or data or recipe have changed since it was written.
    """
    run.create()
    manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
    if manifest.refused:
        Console(soft_wrap=True).print(refusal_table(manifest.refused))
    if resume == "never":
        checkpoints.clear()
    checkpoint = Path(resume) if resume not in ("auto", "never") else checkpoints.newest()
    if checkpoint is not None:
        _, info = read_checkpoint(checkpoint)
        require_same_recipe(recipe, info, checkpoint)
        _require_same_data(manifest, info, checkpoint, run)
        print(f"resuming from step {info.step} ({checkpoint})", flush=True)
    run.describe(recipe, manifest, ranks)
    return None if checkpoint is None else str(checkpoint)


def _require_same_data(manifest: Manifest, info: CheckpointInfo, checkpoint: Path, run: RunFolder) -> None:
    if manifest.hash == info.manifest_hash:
        return
    reason = "was written for other images"
    if info.classes != manifest.classes:
        reason = f"was written for other classes ({', '.join(info.classes)}; now {', '.join(manifest.classes)})"
    elif run.manifest.is_file():
        reason += f" ({_changes(Manifest.load(run.manifest), manifest)})"
    raise UserError("checkpoint", checkpoint, reason, "restore the data, or train anew with another --output")


def _changes(before: Manifest, now: Manifest) -> str:
    """What differs between two manifests, in words: how many images, and the first of each kind."""
    old = {image.path: image for image in before.images}
    new = {image.path: image for image in now.images}
    kinds = {
        "added": [p for p in new if p not in old],
        "removed": [p for p in old if p not in new],
        "changed": [p for p in new if p in old and new[p].digest != old[p].digest],
        "moved to another split": [p for p in new if p in old and new[p].split != old[p].split],
    }
    found = [f"{len(paths)} {kind}, such as {paths[0]}" for kind, paths in kinds.items() if paths]
    return "; ".join(found) or "the checkpoint is of another folder"


def _environment(ranks: Ranks) -> dict[str, object]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda if cuda else None,
    }
