"""Does FPCN pay? Many small trainings on one set of photographs, cross-validated, compared in pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fpcn_dist.recipe import command_line
from fpcn_dist.runtime.names import printable

RECIPE = Path(__file__).parent / "recipes" / "study.yaml"


@dataclass(frozen=True)
class Args:
    """Compare logistic regression, linear heads, FPCN and its parts on pretrained networks, by fold and seed.

    What was trained stays in the output folder: the same command goes on where it was, and more questions and seeds may
    come to it.
    """

    data: command_line.Data
    """Image folder, DIR/<class>/*.jpg."""
    overrides: command_line.Overrides
    recipe: Path = RECIPE
    """Recipe of which every training is a variant; every field can be overridden below."""
    networks: str = "tf_efficientnet_lite0=packaged"
    """Backbones with their weights (as model.pretrained), separated by commas: mobilenet_v2=FILE,resnet18=true."""
    only: str | None = None
    """Some of best,ablation,pairs,batch,whole,lambda,inference,regular; default: all."""
    folds: int = 5
    """Parts of the photographs, each of which is the test part once; one more part chooses learning rates."""
    seeds: int = 5
    """Trainings of each head on each fold."""
    stage_seeds: int = 3
    """Trainings of each last stage on each fold."""
    steps: int = 150
    """Updates of each training."""
    output: Path | None = None
    """Folder for everything; default: runs/study-<data folder name>."""


def main() -> None:
    args = command_line.parse(Args)
    from fpcn_dist.studies.crossval.study import StudyRequest, parse_networks, run_study

    output = args.output or Path("runs") / f"study-{printable(args.data.resolve().name)}"
    request = StudyRequest(
        args.overrides,
        parse_networks(args.networks),
        args.only,
        folds=args.folds,
        seeds=args.seeds,
        stage_seeds=args.stage_seeds,
        steps=args.steps,
    )
    run_study(request, args.data, output)
    print(f"results {output / 'results.md'}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
