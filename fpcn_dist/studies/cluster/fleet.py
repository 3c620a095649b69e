"""Many runs on a Ray cluster: which still have to run, what they cost, and running them whatever happens to its nodes.

All that must outlive this process lies in the run folders: finished runs are skipped when the same is asked for again,
the others go on from their checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpcn_dist.recipe.reading import load_recipe
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runtime.files import write_text
from fpcn_dist.studies.cluster import worker
from fpcn_dist.studies.cluster.connection import Slots, task_result
from fpcn_dist.studies.cluster.groups import RunningGroup
from fpcn_dist.studies.cluster.live import LiveTable
from fpcn_dist.studies.cluster.plan import Group

_ATTEMPTS = 3
"""How often a run may fail without getting any further."""


def survey(output: Path, runs: dict[str, Recipe]) -> tuple[dict[str, str], list[str]]:
    """Find out which runs of an earlier call stopped for good, and which are not at their end.

    Args:
        output: folder of a run folder for each name.
        runs: recipe of each run, by its name; a run whose folder has another recipe is not at its end.
    """
    failures, unfinished = {}, []
    for name, recipe in runs.items():
        run = RunFolder(output / name)
        state, reason = run.read_outcome()
        same = run.recipe.is_file() and _same(load_recipe(run.recipe), recipe)
        if state == "diverged" and same:
            failures[name] = reason or state
        elif state != "finished" or not same:
            unfinished.append(name)
    return failures, unfinished


def _same(before: Recipe, now: Recipe) -> bool:
    """Whether two recipes are one, but for fields that may differ on another cluster, or after a folder has moved.

    What ``now`` leaves to the network was settled when the run began.
    """
    elsewhere = {"data.threads": None, "distill.teacher": None, "distill.bank": None, "train.feature_bank": True}
    shown = before.data.preprocessing
    counts = [recipe.changed(data=recipe.data.settled(shown)).changed(**elsewhere) for recipe in (before, now)]
    return counts[0] == counts[1]


def measure_steps(
    ray: Any, slots: Slots, runs: dict[str, Recipe], classes: int, output: Path, dry_run: bool
) -> dict[str, float]:
    """Seconds of a step on one place, by run; what was measured before on such a place is taken from costs.json.

    The key of a cost in that file is task, backbone, crop, precision and what a place is: runs that have these in
    common cost the same and are measured once.

    Args:
        ray: the module, connected.
        slots: the places of the cluster.
        runs: recipe of each run to measure, by its name.
        classes: the number of classes of the data.
        output: folder of costs.json.
        dry_run: write nothing.
    """
    path, known = output / "costs.json", {}
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = {}  # of an interrupted disk; they are measured again
    keys = {
        name: f"{r.task} {r.model.backbone}, crop {r.data.crop}, {r.train.precision}, {slots.bundle}"
        for name, r in runs.items()
    }
    measure = ray.remote(worker.step_seconds).options(**slots.options, max_retries=2)
    pending = {keys[name]: recipe for name, recipe in runs.items() if keys[name] not in known}
    tasks = {key: measure.remote(recipe.model_dump(), classes) for key, recipe in pending.items()}
    for key, task in tasks.items():
        known[key] = task_result(ray, task)
    if tasks and not dry_run:
        write_text(path, json.dumps(known, indent=2) + "\n")
    return {name: known[key] for name, key in keys.items()}


@dataclasses.dataclass
class _Progress:
    """How often a run has failed, and how far it had come."""

    attempts: int = 0
    step: int = -1


class Fleet:
    """Runs groups of runs side by side on a Ray cluster until each is finished or given up.

    A run that fails goes on from its newest checkpoint, as long as it gets any further between failures; one whose loss
    stops being finite is given up at once. No run suffers from the failure of one of another group.

    Args:
        ray: the module, connected.
        slots: the places of the cluster.
        runs: recipe of each run, by its name.
        output: folder of a run folder for each name, of manifest.json (the checked images) and of logs/.
    """

    def __init__(self, ray: Any, slots: Slots, runs: dict[str, Recipe], output: Path) -> None:
        self.ray, self.slots, self.runs, self.output = ray, slots, runs, output.resolve()
        self.progress = {name: _Progress() for name in runs}
        self.failures: dict[str, str] = {}
        self.queue: deque[Group] = deque()

    def run(self, plan: Sequence[Group]) -> dict[str, str]:
        """Run all groups of a plan; returns, by name, why each run that did not come to its end stopped."""
        self.queue.extend(plan)
        names = [name for group in plan for name in group.runs]
        running: list[RunningGroup] = []
        with LiveTable(self.output, names) as table:
            try:
                while self.queue or running:
                    while self.queue:
                        running.append(self._start(self.queue.popleft()))
                        table.set_states(running[-1].group.runs, "waiting for a place")
                    for group in running:
                        if group.start_when_placed():
                            table.set_states(group.group.runs, "training")
                    for group in self._ended(running):
                        running.remove(group)
                        for name, state in self._settle(group).items():
                            table.set_states([name], state)
                    table.refresh()
            finally:
                for group in running:
                    group.stop()
        return self.failures

    def _start(self, group: Group) -> RunningGroup:
        recipes = {str(self.output / name): self.runs[name].model_dump() for name in group.runs}
        log = str(self.output / "logs" / f"{'+'.join(group.runs)[:100]}")
        return RunningGroup(self.ray, group, self.slots, recipes, str(self.output / "manifest.json"), log)

    def _ended(self, running: Sequence[RunningGroup]) -> list[RunningGroup]:
        """The groups of which a rank has ended; waits up to a second for one."""
        tasks = [task for group in running for task in group.tasks] or [group.placed for group in running]
        done, _ = self.ray.wait(tasks, num_returns=1, timeout=1.0)
        return [group for group in running if set(group.tasks) & set(done)]

    def _settle(self, ended: RunningGroup) -> dict[str, str]:
        """Decide what becomes of each run of a group; those that may try again are queued.

        Returns:
            The state of each run in words, by name.
        """
        result = ended.result()
        ended.stop()
        states, again = {}, []
        for name in ended.group.runs:
            run = RunFolder(self.output / name)
            state, reason = run.read_outcome()
            if state == "finished":
                states[name] = "finished"
            elif state == "diverged":
                self.failures[name] = states[name] = reason or state
            elif result.for_good:
                self.failures[name] = states[name] = result.reason
            elif self._may_try_again(name):
                states[name] = f"waiting to try again ({(reason or result.reason)[:200]})"
                again.append((name, state))
            else:
                self.failures[name] = states[name] = f"given up: {reason or result.reason}"
        # Where the whole group ended with a lost rank, none of its runs is to blame; one that raised tries alone.
        together = tuple(name for name, state in again if state == "unfinished")
        groups = [together] if together else []
        groups += [(name,) for name, state in again if state != "unfinished"]
        self.queue.extend(Group(runs, ended.group.ranks, ended.group.seconds) for runs in groups)
        return states

    def _may_try_again(self, name: str) -> bool:
        folder = self.output / name / "checkpoints"
        steps = [int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors")]
        progress, step = self.progress[name], max(steps, default=-1)
        progress.attempts = 1 if step > progress.step else progress.attempts + 1
        progress.step = step
        return progress.attempts < _ATTEMPTS
