"""Wait until a Ray cluster has as many nodes as expected; batch scripts begin with this."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tyro.conf import Positional

from fpcn_dist.recipe import command_line
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.cluster import connect_ray

_PATIENCE, _HEAD_PATIENCE = 300.0, 120.0
"""Seconds for all nodes, and for the first one to answer."""


@dataclass(frozen=True)
class Args:
    """Wait until a Ray cluster has as many nodes as are expected."""

    address: Positional[str]
    """HOST:PORT of the cluster's head."""
    nodes: Positional[int]
    """How many nodes to wait for."""


def main() -> None:
    args, began = command_line.parse(Args), time.monotonic()
    while True:
        try:
            with connect_ray(args.address) as ray:
                while (alive := sum(node["Alive"] for node in ray.nodes())) < args.nodes:
                    if time.monotonic() - began > _PATIENCE:
                        reason = f"{alive} of {args.nodes} nodes have joined after {_PATIENCE:.0f} s"
                        raise UserError("Ray cluster", args.address, reason, "see logs/ray-*.log in the output folder")
                    time.sleep(0.5)
            return
        except UserError as error:
            if error.field != "--address" or time.monotonic() - began > _HEAD_PATIENCE:
                raise
            time.sleep(1.0)


if __name__ == "__main__":
    command_line.run(main)
