"""Evaluate the model of a finished run, on one or several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fpcn_dist.recipe import command_line
from fpcn_dist.runtime.errors import UserError


@dataclass(frozen=True)
class Args:
    """Evaluate the model in RUN: accuracy, per class, confusion matrix, by object area; rewrites the report.

    With --split all, on the labelled images of any other folder: writes RUN/evaluation-FOLDER.json and no report.
    """

    run: tyro.conf.Positional[Path]
    """Run folder of train.py."""
    split: Literal["train", "val", "test", "all"] | None = None
    """Images to evaluate; default: test where there are some, else val. all: every image of --data, which are others
    than the run's; their folders are named as the model's classes."""
    data: command_line.Data | None = None
    """The image folder, if it has moved since the training; or that of other images."""
    together: bool = False
    """Share the images among all processes that srun or mpirun started, of which otherwise the first works alone. Those
    of torchrun and deepspeed always share them."""


def main() -> None:
    args = command_line.parse(Args)
    from fpcn_dist.deploy.onnx_backbone import with_frozen_backbone
    from fpcn_dist.runs.finish import evaluate_others, evaluate_run
    from fpcn_dist.runs.folder import RunFolder
    from fpcn_dist.runtime.ranks import connect

    run = RunFolder(args.run)
    if args.split == "all" and args.data is None:
        hint = "give --data, or choose train, val or test"
        raise UserError("--split", args.split, "is every image of another folder, and none is given", hint)
    with connect(join=args.together) as ranks:
        if args.split == "all" and args.data is not None:
            evaluate_others(run, ranks, args.data, frozen=with_frozen_backbone)
        else:
            evaluate_run(run, ranks, split=args.split, data=args.data, frozen=with_frozen_backbone)


if __name__ == "__main__":
    command_line.run(main)
