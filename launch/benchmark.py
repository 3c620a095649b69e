"""Measure parts of the system on this machine."""

from __future__ import annotations

from pathlib import Path

import tyro

from fpcn_dist import cli
from fpcn_dist.config import DataConfig
from fpcn_dist.distill import STUDENTS

RECIPES = Path(__file__).parent / "recipes"

app = tyro.extras.SubcommandApp()


@app.command(name="loader")
def loader(data: Path, images: int = 512, repeats: int = 5, config: DataConfig = DataConfig()) -> None:  # noqa: B008
    """CPU milliseconds per image of the data pipeline beside torchvision's DataLoader.

    Args:
        data: Folder of images, at any depth.
        images: Images per repeat.
        repeats: Repeats, interleaved between the loaders; the table shows medians.
        config: Sizes and threads.
    """
    from fpcn_dist.data.benchmark import loader_benchmark

    loader_benchmark(data, config, images=images, repeats=repeats)


@app.command(name="distill")
def distill(
    data: Path, recipe: Path = RECIPES / "distill_small.yaml", students: str = STUDENTS,
    epochs: int | None = None, views: int | None = None, teacher: Path | None = None,
) -> None:  # fmt: skip
    """Time of all students at once beside one after the other, each with its own teacher.

    Args:
        data: Image folder.
        recipe: Recipe of a student.
        students: Networks, separated by commas.
        epochs: Instead of the recipe's.
        views: Instead of the recipe's.
        teacher: Run folder; default: an untrained ResNet-101.
    """
    from fpcn_dist.distill.benchmark import distill_benchmark

    values = cli.load_recipe(recipe).model_dump()
    values["train"]["epochs"] = values["train"]["epochs"] if epochs is None else epochs
    values["data"]["views"] = values["data"]["views"] if views is None else views
    loaded = cli.recipe_from_dict(values, recipe)
    distill_benchmark(data, loaded, students=students.split(","), teacher=teacher)


if __name__ == "__main__":
    cli.run(app.cli)
