"""What a trial asks for, and whether a cluster can hold it."""

from __future__ import annotations

import pytest

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.cluster import Slots
from fpcn_dist.studies.search.resources import count_places, require_places, trial_bundles

GPUS, CPUS = Slots("GPU", 8, 6), Slots("CPU", 2, 16)


@pytest.mark.parametrize(
    ("slots", "threads", "workers", "gpus", "bundles"),
    [
        (GPUS, None, None, None, [{"CPU": 6.0, "GPU": 1.0}]),
        (GPUS, None, None, 4, [{"CPU": 6.0, "GPU": 1.0}] * 4),
        (GPUS, None, 2, None, [{"CPU": 6.0, "GPU": 1.0}] * 2),
        (GPUS, None, None, 0.5, [{"CPU": 3.0, "GPU": 0.5}]),
        (GPUS, 2, None, 0.5, [{"CPU": 2.0, "GPU": 0.5}]),
        (GPUS, None, None, 0, [{"CPU": 1.0}]),
        (CPUS, None, None, None, [{"CPU": 1.0}]),
        (CPUS, 4, 2, None, [{"CPU": 4.0}] * 2),
    ],
)
def test_bundles(slots, threads, workers, gpus, bundles):
    assert trial_bundles(slots, threads, workers=workers, gpus=gpus) == bundles


@pytest.mark.parametrize(
    ("slots", "workers", "gpus", "message"),
    [
        (CPUS, None, 1, "--gpus-per-trial 1: the cluster has no GPU"),
        (GPUS, 2, 1, r"--gpus-per-trial 1: a rank uses one GPU, and the trial has 2 rank\(s\); give 2"),
        (GPUS, None, 1.5, "--gpus-per-trial 1.5: a rank uses one GPU"),
        (GPUS, 0, None, "--workers-per-trial 0"),
        (GPUS, None, -1, "--gpus-per-trial -1: is negative"),
    ],
)
def test_what_does_not_go_together(slots, workers, gpus, message):
    with pytest.raises(UserError, match=message):
        trial_bundles(slots, None, workers=workers, gpus=gpus)


def test_places_are_counted_node_by_node():
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert count_places(nodes, [{"CPU": 3.0, "GPU": 1.0}]) == 4
    assert count_places(nodes, [{"CPU": 5.0, "GPU": 1.0}]) == 2
    assert count_places(nodes, [{"CPU": 3.0, "GPU": 1.0}] * 3) == 1
    assert count_places(nodes, [{"CPU": 4.0, "GPU": 0.5}]) == 4


def test_what_no_node_holds_is_refused():
    with pytest.raises(UserError, match=r"trial 1 x 9 CPU: the cluster's 2 node\(s\) cannot hold one \(8 CPU; 4 CPU\)"):
        require_places([{"CPU": 8.0}, {"CPU": 4.0}], [{"CPU": 9.0}])
