"""Measure parts of the system on this machine."""

from __future__ import annotations

from pathlib import Path

import tyro

from fpcn_dist.recipe import command_line
from fpcn_dist.recipe.reading import load_recipe, recipe_from_dict
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.scaling.model import Inputs
from fpcn_dist.studies.distill import STUDENTS

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
    from fpcn_dist.studies.distill.benchmark import distill_benchmark

    values = load_recipe(recipe).model_dump()
    values["train"]["epochs"] = values["train"]["epochs"] if epochs is None else epochs
    values["data"]["views"] = values["data"]["views"] if views is None else views
    loaded = recipe_from_dict(values, recipe)
    distill_benchmark(data, loaded, students=students.split(","), teacher=teacher)


@app.command(name="scaling")
def scaling(ranks: str = "1,2,4,8", images: int = 42, measure: bool = True, model: Inputs = Inputs()) -> None:  # noqa: B008
    """Bytes that ranks send and memory that they need, measured here; and the time of a step on up to 1,024 GPUs.

    Args:
        ranks: Numbers of gloo ranks to start on this machine, separated by commas.
        images: Images of each of these ranks.
        measure: Measure at all; else only compute.
        model: What the time of a step is computed from; docs/scaling.md names the sources.
    """
    from fpcn_dist.scaling.benchmark import scaling_benchmark

    try:
        sizes = [int(size) for size in ranks.split(",")]
    except ValueError:
        raise UserError("--ranks", ranks, "are numbers separated by commas", "give for example 1,2,4,8") from None
    scaling_benchmark(model, ranks=sizes, images=images, measure=measure)


if __name__ == "__main__":
    command_line.run(app.cli)
