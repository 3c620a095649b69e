"""Look whether this machine, or these ranks, are fit for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fpcn_dist.recipe import command_line


@dataclass(frozen=True)
class Args:
    """Check packages, GPUs, decoding, kernels, disk and network; under a launcher also how the ranks reach each other.

    Prints a line for each check: ok, warning or problem, with how to mend it. Exit status 1 if there is a problem.
    """

    data: command_line.Data | None = None
    """Data to look at as well: their shape, classes, images, files that cannot be used."""
    output: Path | None = None
    """Where runs are to go; default: runs/ where it exists, else the current folder."""


def main() -> None:
    args = command_line.parse(Args)
    from fpcn_dist.doctor.examination import examine

    raise SystemExit(examine(args.output, args.data))


if __name__ == "__main__":
    command_line.run(main)
