"""Draw a folder of synthetic rock photographs to try things on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fpcn_dist.recipe import command_line
from fpcn_dist.runtime.names import printable


@dataclass(frozen=True)
class Args:
    """Draw basalt, dolomite and marble as JPEG files OUTPUT/<class>/NNNN.jpg."""

    output: Path
    """Folder to write; images already there are written again."""
    images_per_class: int = 200
    """Images of each of the three classes."""
    seed: int = 0
    """The same seed draws the same images."""


def main() -> None:
    args = command_line.parse(Args)
    from fpcn_dist.data.synthetic import generate

    generate(args.output, images_per_class=args.images_per_class, seed=args.seed)
    print(f"{3 * args.images_per_class} images in {printable(args.output)}")


if __name__ == "__main__":
    command_line.run(main)
