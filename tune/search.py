"""Search lambda, T, the pairs per batch, or any other field of a recipe, with Ray Tune."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fpcn_dist.recipe import command_line
from fpcn_dist.recipe.reading import load_recipe
from fpcn_dist.runtime.names import printable


@dataclass(frozen=True)
class Args:
    """Train many trials of a recipe, end the poor ones early, and write the best recipe, all results and a report."""

    recipe: Path
    """Recipe of the teacher or, with --stage student, of a student. Every field can be overridden below; search.space
    names more fields to search."""
    data: command_line.Data
    """Image folder, as for train.py."""
    stage: Literal["teacher", "student", "joint"]
    """teacher: lambda and the pairs; student: T and alpha, for --distill.teacher RUN; joint: both at once."""
    overrides: command_line.Overrides
    output: Path | None = None
    """Folder of the search; default: runs/search-<recipe name>-<data folder name>."""
    student_recipe: Path | None = None
    """Recipe of a student, for --stage joint."""
    students: str = ""
    """Networks to distil together in each trial, separated by commas; default: the one of the recipe."""
    trials: int = 40
    """How many trials."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """Who ends trials early: ASHA, population-based training, or nobody."""
    multi_objective: str = "accuracy"
    """accuracy, or accuracy,latency: then the result is a Pareto front."""
    address: str | None = None
    """Ray cluster to run on (auto, or HOST:PORT); default: one of its own, on this machine alone."""
    gpus_per_trial: float | None = None
    """GPUs of a trial; a part of one (0.5, say) lets trials share. Default: one a worker, where there are any."""
    workers_per_trial: int | None = None
    """Ranks of a trial; default: one for each of its GPUs."""
    resume: bool = False
    """Go on with the search in OUTPUT, given the same command."""


def main() -> None:
    args = command_line.parse(Args)
    from fpcn_dist.studies.search.request import SearchRequest
    from fpcn_dist.studies.search.run_search import search

    def split(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    recipe, student = args.overrides, args.student_recipe and load_recipe(args.student_recipe, "--student-recipe")
    output = args.output or Path("runs") / f"search-{recipe.name}-{printable(args.data.resolve().name)}"
    request = SearchRequest(
        recipe,
        args.stage,
        student=student,
        students=split(args.students),
        trials=args.trials,
        scheduler=args.scheduler,
        objectives=split(args.multi_objective),
        workers=args.workers_per_trial,
        gpus=args.gpus_per_trial,
    )
    search(request, args.data, output, address=args.address, resume=args.resume)


if __name__ == "__main__":
    command_line.run(main)
