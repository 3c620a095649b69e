"""Classify photographs with the model of a finished run, and show where it looked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from fpcn_dist import cli


@dataclass(frozen=True)
class Args:
    """Classify images: prints a table, writes predictions.json, predictions.csv and overlays/*.png."""

    model: tyro.conf.Positional[Path]
    """Run folder of train.py, or any folder with its model.safetensors and config.json."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, and folders to search for them."""
    output: Path = Path("predictions")
    """Folder to write."""


def main() -> None:
    args = cli.parse(Args)
    import torch

    from fpcn_dist.predict import predict

    device = "cuda" if torch.cuda.is_available() else "cpu"
    predict(args.model, args.images, args.output, device=device)


if __name__ == "__main__":
    cli.run(main)
