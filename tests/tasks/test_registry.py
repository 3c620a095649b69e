"""Every task of a recipe has its rules, its network and its losses."""

from __future__ import annotations

from typing import get_args

from fpcn_dist.models import NETWORKS
from fpcn_dist.recipe import schema
from fpcn_dist.tasks import TASKS


def test_every_task_stands_in_every_table() -> None:
    assert set(get_args(schema.Task)) == set(schema._TASK_RULES) == set(NETWORKS) == set(TASKS)
