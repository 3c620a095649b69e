"""Time of training a head on a frozen backbone: features computed once, beside features computed in every step."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from benchmarks._harness import machine, show, write_json
from fpcn_dist.data.synthetic import generate
from fpcn_dist.recipe import command_line
from fpcn_dist.recipe.reading import load_recipe
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.ranks import Ranks, connect
from fpcn_dist.training import run as training_run
from fpcn_dist.training.loop import train

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "fpcn_laptop.yaml"
SHIFTS = 4
"""Partners of each image, where a recipe takes shifts: their number depends on the classes of the data."""


class Side(NamedTuple):
    """What one way of training has taken.

    Attributes:
        total: seconds from the command to the report.
        first_pass: seconds of it in which features were computed ahead.
        step: the median of the seconds of a step, with the wait for its batch.
        losses: of every step.
    """

    total: float
    first_pass: float
    step: float
    losses: list[float]


def measure(recipe: Recipe, data: Path, output: Path, ranks: Ranks) -> Side:
    """Train ``recipe`` from beginning to end, each step a log point."""
    ahead, attach = [], training_run.attach_features

    def timed(*args, **options):
        began = time.perf_counter()
        try:
            return attach(*args, **options)
        finally:
            ahead.append(time.perf_counter() - began)

    training_run.attach_features, began = timed, time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train(recipe, data, output, ranks)
    finally:
        training_run.attach_features = attach
    total = time.perf_counter() - began
    steps = [line for line in read_metrics(output) if line["kind"] == "step"]
    images = recipe.data.batch_size(len(list(data.iterdir())))
    seconds = statistics.median(images / line["images_per_second"] for line in steps)
    return Side(total, sum(ahead), seconds, [line["loss"] for line in steps])


def features(
    data: Path | None = None,
    recipe: Path = RECIPE,
    epochs: int = 8,
    images_per_class: int = 24,
    json: Path = Path("runs/benchmarks/features.json"),
) -> None:
    """Time of training a head on a frozen backbone: features computed once, beside features computed in every step.

    Both sides make the same steps, and their losses are compared. The network has random weights, which cost the same.

    Args:
        data: Image folder, DIR/<class>/; default: synthetic photographs of three rocks.
        recipe: With a frozen backbone.
        epochs: Instead of the recipe's.
        images_per_class: Of the synthetic photographs.
        json: Figures go here.
    """
    loaded = load_recipe(recipe)
    changes: dict[str, Any] = {
        "train.epochs": epochs,
        "train.log_every": 1,
        "train.eval_every": epochs,
        "model.pretrained": False,
    }
    for name, count in (("--epochs", epochs), ("--images-per-class", images_per_class)):
        if count < 1:
            raise UserError(name, count, "there would be nothing to train on", "take 1 or more")
    with tempfile.TemporaryDirectory(prefix="fpcn-features-") as folder, connect() as ranks:
        root = Path(folder)
        if data is None:
            data = root / "rocks"
            generate(data, images_per_class=images_per_class, seed=0)
        if loaded.contrast.pairs == "shifts":
            changes["contrast.num_pairs"] = SHIFTS * loaded.data.batch_size(len(list(data.iterdir())))
        loaded = loaded.changed(**changes)
        stored = measure(loaded, data, root / "stored", ranks)
        computed = measure(loaded.changed(**{"train.feature_bank": False}), data, root / "computed", ranks)
    equal = "the same bits" if stored.losses == computed.losses else "NOT EQUAL"
    sides = {"once, in a bank": stored, "in every step": computed}
    rows = [
        [name, f"{1 / s.step:.1f}", f"{1e3 * s.step:.1f}", f"{s.first_pass:.1f}", f"{s.total:.1f}"]
        for name, s in sides.items()
    ]
    title = (
        f"{loaded.task} on {loaded.model.backbone}, {loaded.data.crop} px, {len(stored.losses)} steps; losses: {equal}"
    )
    ratio = (
        f"steps {computed.step / stored.step:.0f} times as fast, the whole {computed.total / stored.total:.1f} times"
    )
    where = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    show(title, ["features", "steps/s", "ms a step", "first pass, s", "total, s"], rows, 1, f"{ratio}; {where}")
    write_json(json, {"machine": where, "recipe": loaded.model_dump()} | {n: s._asdict() for n, s in sides.items()})


def main() -> None:
    command_line.run(lambda: tyro.cli(features))
