"""A group of runs on a Ray cluster: its placement group, its ranks, and how it ended."""

from __future__ import annotations

from typing import Any, NamedTuple

from fpcn_dist.runtime.errors import Outage, UserError
from fpcn_dist.studies.cluster import Slots, worker
from fpcn_dist.studies.cluster.errors import last_line
from fpcn_dist.studies.cluster.plan import Group
from fpcn_dist.studies.cluster.ranks import Rendezvous


class GroupResult(NamedTuple):
    """How a group ended.

    Attributes:
        reason: what ended it before all its runs were at their end; empty if nothing did.
        for_good: whether another attempt would end the same way.
    """

    reason: str
    for_good: bool


class _Rank:
    """One rank of a group: a Ray actor, so that the end of its process or node is noticed."""

    def __init__(self) -> None:
        self.meeting: Rendezvous | None = None

    def address(self) -> str:
        """Open the place where the ranks of the group meet, on the first of them; returns its address."""
        import ray

        self.meeting = Rendezvous(ray.util.get_node_ip_address())
        return self.meeting.address

    def train(self, *arguments: Any, meeting: str, **options: Any) -> dict[str, str]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        return worker.train_rank(*arguments, **options, meeting=self.meeting or meeting, node=node)


class RunningGroup:
    """Asks the cluster for a place per rank, all at once, and trains there as soon as they are given.

    Args:
        ray: the module.
        group: runs and ranks.
        slots: what a place is.
        recipes: nested dictionaries, by run folder.
        manifest: file of the checked images.
        log: beginning of the path of each rank's output, which ``-rank0.log`` and so on complete.
    """

    def __init__(
        self, ray: Any, group: Group, slots: Slots, recipes: dict[str, dict[str, Any]], manifest: str, log: str
    ) -> None:
        from ray.util.placement_group import placement_group

        self._ray, self.group, self._slots = ray, group, slots
        self._recipes, self._manifest, self._log = recipes, manifest, log
        self._placement = placement_group([slots.bundle] * group.ranks, strategy="PACK")
        self.placed = self._placement.ready()
        self.tasks: list[Any] = []
        self._actors: list[Any] = []

    def start_when_placed(self) -> bool:
        """Start the ranks if there is a place for each, and they are not running yet; tells whether it did."""
        if self.tasks or not self._ray.wait([self.placed], timeout=0)[0]:
            return False
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self._slots.bundle
        rank_actor = self._ray.remote(_Rank)
        self._actors = [
            rank_actor.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, rank),
            ).remote()
            for rank in range(self.group.ranks)
        ]
        # A reference: the ranks wait for it where they are, not we.
        address = self._actors[0].address.remote()
        self.tasks = [
            actor.train.remote(
                self._recipes,
                self._manifest,
                rank=rank,
                world_size=self.group.ranks,
                meeting=address,
                log=f"{self._log}-rank{rank}.log",
            )
            for rank, actor in enumerate(self._actors)
        ]
        return True

    def result(self) -> GroupResult:
        """How the group ended; to be asked once a rank has."""
        done, _ = self._ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)
        try:
            self._ray.get(done)
            # One rank is at its end, so the others will be in a moment.
            self._ray.get(self.tasks, timeout=120)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                return GroupResult(str(error.cause), for_good=not isinstance(error.cause, Outage))
            return GroupResult(last_line(error.cause or error), for_good=False)
        except self._ray.exceptions.GetTimeoutError:
            return GroupResult("a rank did not end with the others", for_good=False)
        except self._ray.exceptions.RayError as error:
            return GroupResult(f"lost a process or a node ({type(error).__name__})", for_good=False)
        return GroupResult("", for_good=False)

    def stop(self) -> None:
        """End all ranks and give their places back."""
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            self._ray.kill(actor)
        remove_placement_group(self._placement)
