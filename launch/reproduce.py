"""Train and measure all that the paper compares, on other photographs, and report the paper's numbers beside ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fpcn_dist.recipe import command_line
from fpcn_dist.runtime.names import printable
from fpcn_dist.studies.distill import STUDENTS

RECIPES = Path(__file__).parent / "recipes"
SCALES = {"tiny": RECIPES / "fpcn_tiny.yaml", "paper": RECIPES / "fpcn_resnet101.yaml"}


@dataclass(frozen=True)
class Args:
    """The paper's Tables 2, 3 and 4 and Figures 3, 4 and 5 on the photographs in DATA: a grid of runs and one report.

    Prints what it will take and asks before it begins. Killed, it goes on when the same command is given again.
    """

    data: command_line.Data
    """Image folder, as for train.py."""
    overrides: command_line.Overrides
    scale: Literal["tiny", "paper"] = "tiny"
    """tiny: small networks on small images, minutes on two CPU cores; paper: the paper's setting, for GPUs. Every field
    of the scale's recipe can be overridden below."""
    only: str | None = None
    """Some of table2,table3,table4,figure3,figure4,figure5; default: all."""
    seeds: int = 1
    """Trainings of each, on the same images."""
    students: str = STUDENTS
    """Networks of Table 4, separated by commas."""
    output: Path | None = None
    """Folder for everything; default: runs/reproduce-SCALE-<data folder name>."""
    address: str | None = None
    """Ray cluster to run on (auto, or HOST:PORT); default: one of its own, on this machine alone."""
    yes: bool = False
    """Begin without asking."""


def main() -> None:
    args = command_line.parse(Args, presets=("--scale", "tiny", SCALES))
    from fpcn_dist.studies.reproduce.experiments import parse_sections
    from fpcn_dist.studies.reproduce.reproduction import ReproductionRequest, reproduce

    output = args.output or Path("runs") / f"reproduce-{args.scale}-{printable(args.data.resolve().name)}"
    students = tuple(name.strip() for name in args.students.split(",") if name.strip())
    request = ReproductionRequest(
        args.overrides, RECIPES / "compared", args.scale, parse_sections(args.only), args.seeds, students
    )
    reproduce(request, args.data, output, address=args.address, yes=args.yes)


if __name__ == "__main__":
    command_line.run(main)
