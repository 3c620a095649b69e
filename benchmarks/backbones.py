"""What each family of timm's networks gives: a map or one vector, its shape, and whether it takes other image sizes.

Of each module of timm the network with the fewest parameters is built, without weights, and its features are computed:
on the meta device, which holds no numbers, or in memory where that cannot be. Needs no network.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from rich.progress import track

from fpcn_dist.models import Backbone, build_backbone
from fpcn_dist.runtime.errors import UserError, nearest

SIDE, OTHER = 224, 192
"""Pixels: what each network is shown, and what it is shown beside that."""

_LARGE = ("base", "large", "huge", "giant", "gigantic", "enormous")
_MOST = 200_000_000
"""Parameters above which a network that has no form on the meta device is not built."""
_BEGIN, _END = "<!-- python -m benchmarks backbones -->", "<!-- end -->"


class Row(NamedTuple):
    """What one network gives.

    Attributes:
        family: module of timm.
        network: its smallest network.
        millions: of parameters, of the backbone alone.
        features: shape, or why there is none.
        other: whether it takes images of :data:`OTHER` pixels too.
    """

    family: str
    network: str
    millions: float
    features: str
    other: str

    def __str__(self) -> str:
        return f"| {self.family} | `{self.network}` | {self.millions:.1f} | {self.features} | {self.other} |"


def smallest(family: str) -> tuple[str, int]:
    """The network of a module of timm with the fewest parameters, and their number."""
    names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
    small = [name for name in names if not any(word in name for word in _LARGE)]
    counted = {name: _parameters(name) for name in small or names}
    name = min(counted, key=lambda name: counted[name])
    return name, counted[name]


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, num_classes=0).parameters())


def row(family: str) -> Row:
    """Builds the smallest network of a family and looks at its features."""
    name, count = smallest(family)
    reason = "not built: too large for memory"
    for device in ("meta", "cpu") if count <= _MOST else ("meta",):
        try:
            with torch.device(device):
                backbone = build_backbone(name).eval()
                side, shape = _shape(backbone)
                other = "yes" if _takes(backbone, OTHER) else "no"
        except UserError as error:
            reason = f"refused: {error.reason}"
            break
        except (NotImplementedError, RuntimeError) as error:
            if device == "cpu":  # what the meta device has no form of, this one must build
                reason = f"not built: {str(error).splitlines()[0]}"
            continue
        kind = " x ".join(map(str, shape[1:])) if backbone.has_map else f"a vector of {shape[1]}"
        at = "" if side == SIDE else f" (at {side} px)"
        return Row(family, name, _count(backbone) / 1e6, f"{kind}{at}", other)
    return Row(family, name, count / 1e6, reason, "")


def _count(backbone: Backbone) -> int:
    return sum(parameter.numel() for parameter in backbone.parameters())


def _shape(backbone: Backbone) -> tuple[int, tuple[int, ...]]:
    """The side of the image and the shape of its features; the published side where 224 is refused."""
    for side in (SIDE, backbone.published_side):
        if _takes(backbone, side):
            with torch.no_grad():
                return side, tuple(backbone(torch.zeros(1, 3, side, side)).shape)
    raise UserError("model.backbone", type(backbone.net).__name__, "takes no images", "use another")


def _takes(backbone: Backbone, side: int) -> bool:
    try:
        with torch.no_grad():
            backbone(torch.zeros(1, 3, side, side))
    except UserError:
        return False
    return True


def table(rows: Iterator[Row]) -> str:
    """A Markdown table."""
    head = f"| Module of timm | Its smallest network | M | C x h x w at {SIDE} px | {OTHER} px too |"
    return "\n".join([head, "|---|---|---:|---|---|", *map(str, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks backbones", description=__doc__)
    parser.add_argument("families", nargs="*", help="modules of timm (all of them)")
    parser.add_argument("--docs", type=Path, help="a page whose table is replaced (printed only)")
    arguments = parser.parse_args()
    known = timm.list_modules()
    for family in arguments.families:
        if family not in known:
            parser.error(f"{family!r} is no module of timm; {nearest(family, known)}")
    if arguments.docs is not None and not arguments.docs.is_file():
        parser.error(f"argument --docs: {arguments.docs}: there is no such page; give one with the table's marks")
    families = sorted(arguments.families or known)
    written = table(row(family) for family in track(families, "Building", transient=True))
    print(written)
    if arguments.docs is not None:
        page = arguments.docs.read_text(encoding="utf-8")
        before, _, after = page.partition(_BEGIN)
        arguments.docs.write_text(
            f"{before}{_BEGIN}\n\n{written}\n\n{_END}{after.partition(_END)[2]}", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
