"""Measure parts of the system on this machine."""

from __future__ import annotations

from pathlib import Path

import tyro

from fpcn_dist import cli
from fpcn_dist.config import DataConfig

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


if __name__ == "__main__":
    cli.run(app.cli)
