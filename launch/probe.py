"""The bar to beat: simple classifiers on the frozen features of a pretrained backbone, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fpcn_dist.recipe import command_line

RECIPE = Path(__file__).parent / "recipes" / "probe.yaml"


@dataclass(frozen=True)
class Args:
    """Fit logistic regression and nearest class means to frozen features of photographs, and print what they reach."""

    data: command_line.Data
    """Image folder, with or without train/, val/ and test/ above the class folders."""
    overrides: command_line.Overrides
    recipe: Path = RECIPE
    """Recipe whose backbone, weights, sizes and split are probed; every field can be overridden below."""
    folds: int = 0
    """Folds of a cross-validation over all images; 0: fit on the training images, score on the test (or val) images."""
    output: Path | None = None
    """Folder for probe.json; default: nothing is written."""


def main() -> None:
    args = command_line.parse(Args)
    from fpcn_dist.runtime.ranks import own_device
    from fpcn_dist.training.probe import probe_folder

    probe_folder(args.overrides, args.data, own_device(), folds=args.folds, output=args.output)


if __name__ == "__main__":
    command_line.run(main)
