"""python -m fpcn_dist.cluster ADDRESS NODES: wait until a Ray cluster has as many nodes; batch scripts begin so."""

from __future__ import annotations

import sys
import time

from fpcn_dist import cli
from fpcn_dist.cluster import connect_ray
from fpcn_dist.errors import UserError

_PATIENCE, _HEAD_PATIENCE = 300.0, 120.0
"""Seconds for all nodes, and for the first one to answer."""


def main() -> None:
    address, wanted = sys.argv[1], int(sys.argv[2])
    began = time.monotonic()
    while True:
        try:
            with connect_ray(address) as ray:
                while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
                    if time.monotonic() - began > _PATIENCE:
                        reason = f"{alive} of {wanted} nodes have joined after {_PATIENCE:.0f} s"
                        raise UserError("Ray cluster", address, reason, "see logs/ray-*.log in the output folder")
                    time.sleep(0.5)
            return
        except UserError as error:
            if error.field != "--address" or time.monotonic() - began > _HEAD_PATIENCE:
                raise
            time.sleep(1.0)


if __name__ == "__main__":
    cli.run(main)
