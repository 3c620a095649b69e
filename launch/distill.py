"""Distil a trained teacher into small students, all at once, on this machine or a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fpcn_dist.recipe import command_line
from fpcn_dist.runtime.names import printable
from fpcn_dist.studies.distill import STUDENTS


@dataclass(frozen=True)
class Args:
    """Train students of a teacher side by side, measure them, export them: a run folder each below OUTPUT."""

    teacher: Path
    """Run folder of the teacher, or any folder with its model.safetensors and config.json."""
    data: command_line.Data
    """Image folder, as for train.py; classes and split must be those of the teacher."""
    recipe: Path
    """Recipe of a student (launch/recipes/distill*.yaml). Every field can be overridden below."""
    overrides: command_line.Overrides
    output: Path | None = None
    """Folder of all run folders; default: runs/<recipe name>-<data folder name>. The same command goes on in it."""
    students: str = STUDENTS
    """Networks, separated by commas: torchvision's or timm's classifiers by name."""
    baselines: bool = False
    """Also train each student without the teacher."""
    address: str | None = None
    """Ray cluster to run on (auto, or HOST:PORT); default: one of its own, on this machine alone."""
    gpus: int | None = None
    """GPUs of the cluster to use; default: all."""
    dry_run: bool = False
    """Print the plan, and do nothing."""


def main() -> None:
    args = command_line.parse(Args)
    from fpcn_dist.studies.distill.distillation import distill

    recipe = args.overrides.changed(**{"distill.teacher": str(args.teacher)})
    output = args.output or Path("runs") / f"{recipe.name}-{printable(args.data.resolve().name)}"
    students = [name.strip() for name in args.students.split(",") if name.strip()]
    distill(
        recipe,
        args.data,
        output,
        students=students,
        baselines=args.baselines,
        address=args.address,
        gpus=args.gpus,
        dry_run=args.dry_run,
    )


if __name__ == "__main__":
    command_line.run(main)
