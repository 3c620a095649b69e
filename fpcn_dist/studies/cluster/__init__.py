"""Training on a Ray cluster: how it is joined, and how processes that Ray placed become ranks."""

from fpcn_dist.studies.cluster.connection import Slots, connect_ray, find_slots, task_result

__all__ = ["Slots", "connect_ray", "find_slots", "task_result"]
