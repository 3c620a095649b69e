"""The places that a cluster offers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.cluster import Slots, find_slots

GONE = {"Alive": False, "Resources": {"CPU": 64.0}}


def cluster(*nodes: dict[str, float]) -> SimpleNamespace:
    return SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes] + [GONE])


@pytest.mark.parametrize(
    ("nodes", "cpus", "slots"),
    [
        ([{"CPU": 8.0}, {"CPU": 5.0}], None, Slots("CPU", 2, 5)),
        ([{"CPU": 8.0}, {"CPU": 5.0}], 2, Slots("CPU", 6, 2)),
        ([{"CPU": 8.0}, {"CPU": 5.0}], 6, Slots("CPU", 1, 6)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 9.0, "GPU": 1.0}, {"CPU": 32.0}], None, Slots("GPU", 3, 4)),
        ([{"CPU": 8.0, "GPU": 2.0}], 16, Slots("GPU", 2, 4)),
    ],
)
def test_places(nodes, cpus, slots):
    assert find_slots(cluster(*nodes), cpus) == slots


def test_more_threads_than_any_node_has_cores():
    message = r"data\.threads 9: .*8 cores.*; .*8"
    with pytest.raises(UserError, match=message):
        find_slots(cluster({"CPU": 8.0}, {"CPU": 4.0}), 9)


def test_no_node():
    with pytest.raises(UserError, match="--address: the cluster has no node with a CPU core; add nodes to it"):
        find_slots(cluster())
