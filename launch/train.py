"""Train a recipe on a folder of photographs: with python, torchrun, deepspeed or srun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fpcn_dist.recipe import command_line
from fpcn_dist.runtime.names import printable


@dataclass(frozen=True)
class Args:
    """Train a recipe on a folder of photographs, DIR/<class>/*.jpg, and write model, metrics and report."""

    recipe: Path
    """Recipe file; launch/recipes/ has some. Every field can be overridden below."""
    data: command_line.Data
    """Image folder, with or without train/, val/ and test/ above the class folders; or a table, Parquet files or tar
    shards; or the URL of a remote folder (docs/data.md)."""
    overrides: command_line.Overrides
    output: Path | None = None
    """Run folder; default: runs/<recipe name>-<data folder name>. The same command resumes what is in it."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint; never: begin again, and move what is there to OUTPUT/previous/; best: go
    on from the best one; or the path of a checkpoint, or of a run, for its newest. Given again, the command goes on."""
    extend: bool = False
    """Train a run on for more epochs (train.epochs), at the learning rates of the longer plan from here on."""
    profile: bool = False
    """Write a trace of a few early steps to RUN/profile/."""


def main() -> None:
    args = command_line.parse(Args)
    from fpcn_dist.runtime.preemption import Preemption
    from fpcn_dist.runtime.ranks import connect
    from fpcn_dist.training.loop import train

    recipe = args.overrides
    output = args.output or Path("runs") / f"{recipe.name}-{printable(args.data.resolve().name)}"
    with connect() as ranks, Preemption(ranks) as preemption:
        options = {"resume": args.resume, "extend": args.extend, "profile": args.profile}
        train(recipe, args.data, output, ranks, preemption=preemption, **options)


if __name__ == "__main__":
    command_line.run(main)
