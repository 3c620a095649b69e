"""Time of a whole distillation: all students by the driver, beside one after the other, each with its own teacher."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.deploy.onnx_export import export_onnx
from fpcn_dist.models import build_model
from fpcn_dist.recipe import command_line
from fpcn_dist.recipe.reading import load_recipe, recipe_from_dict
from fpcn_dist.recipe.schema import ModelConfig, Recipe
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.runs.model_folder import save_model
from fpcn_dist.runtime.ranks import connect
from fpcn_dist.studies.distill import STUDENTS
from fpcn_dist.studies.distill.distillation import distill
from fpcn_dist.training.loop import train
from fpcn_dist.training.soft_labels.students import check_recipe

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "distill_small.yaml"


def distill_benchmark(data: Path, recipe: Recipe, *, students: Sequence[str], teacher: Path | None) -> dict[str, float]:
    """Run both sides once, one after the other, on the same images, views and steps; prints a table.

    The sequential side trains each student in this process with the teacher in each step (``teacher_mode`` "online"),
    as one would without this driver. Both end with evaluated and exported models and their reports; only the driver's
    time also includes starting Ray, and measuring the cost of each network.

    Args:
        data: image folder.
        recipe: of a student.
        students: networks.
        teacher: an exported model; ``None``: an FPCN with an untrained ResNet-101, which costs what a trained one does.

    Returns:
        Seconds of each side.

    Raises:
        UserError: as :func:`distill`.
    """
    with tempfile.TemporaryDirectory(prefix="fpcn-distill-") as folder:
        root = Path(folder)
        manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
        if teacher is None:
            teacher = root / "teacher"
            _untrained_teacher(teacher, recipe, manifest.classes)
        ours = {"distill.teacher": str(teacher.resolve()), "distill.teacher_mode": "bank"}
        recipe = check_recipe(recipe.changed(**ours), students)
        online = recipe.changed(**{"distill.teacher_mode": "online"})
        seconds, began = {}, time.perf_counter()
        with connect() as ranks:
            for student in students:
                train(online.changed(**{"model.backbone": student}), data, root / student, ranks)
                export_onnx(root / student)
        seconds["one after the other, teacher in each step"] = time.perf_counter() - began
        lines = [line for line in read_metrics(root / students[0]) if line["kind"] == "step"]
        batch_size = recipe.data.batch_size(len(manifest.classes))
        images = len(lines) * batch_size * len(students)

        began = time.perf_counter()
        distill(recipe, data, root / "together", students=students)
        seconds["all at once, soft-label bank"] = time.perf_counter() - began
    _show(seconds, images, f"{len(students)} students, {recipe.train.epochs} epochs, {recipe.data.views} views")
    return seconds


def _untrained_teacher(folder: Path, recipe: Recipe, classes: Sequence[str]) -> None:
    config = ModelConfig(backbone="resnet101", pretrained=False)
    torch.manual_seed(recipe.seed)
    folder.mkdir()
    described = recipe.changed(task="contrast", model=config.model_dump())
    save_model(folder, build_model(config, len(classes), task="contrast"), described, classes)


def _show(seconds: dict[str, float], images: int, title: str) -> None:
    (_, sequential), *_ = seconds.items()
    table = Table("way", "seconds", "student images/s", "ratio", title=title)
    for name, taken in seconds.items():
        table.add_row(name, f"{taken:.1f}", f"{images / taken:.1f}", f"{taken / sequential:.2f}")
    Console().print(table)
    print(json.dumps({name: round(taken, 2) for name, taken in seconds.items()}))


def distillation(
    data: Path,
    recipe: Path = RECIPE,
    students: str = STUDENTS,
    epochs: int | None = None,
    views: int | None = None,
    teacher: Path | None = None,
) -> None:
    """Time of all students at once beside one after the other, each with its own teacher.

    Args:
        data: Image folder.
        recipe: Recipe of a student.
        students: Networks, separated by commas.
        epochs: Instead of the recipe's.
        views: Instead of the recipe's.
        teacher: Run folder; default: an untrained ResNet-101.
    """
    values = load_recipe(recipe).model_dump()
    values["train"]["epochs"] = values["train"]["epochs"] if epochs is None else epochs
    values["data"]["views"] = values["data"]["views"] if views is None else views
    loaded = recipe_from_dict(values, recipe)
    distill_benchmark(data, loaded, students=students.split(","), teacher=teacher)


def main() -> None:
    command_line.run(lambda: tyro.cli(distillation))
