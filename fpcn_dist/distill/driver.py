"""Every student at once: plan, soft labels, groups of students on a Ray cluster, results.

All that must outlive this process lies in the output folder: finished students are skipped when the same command is
given again, the others go on from their checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fpcn_dist.cli import load_recipe
from fpcn_dist.cluster import Slots, connect_ray, find_slots, task_result
from fpcn_dist.config import Recipe
from fpcn_dist.data.manifest import build_manifest
from fpcn_dist.distill import BASELINE, worker
from fpcn_dist.distill.bank_job import write_bank
from fpcn_dist.distill.groups import RunningGroup
from fpcn_dist.distill.live import LiveTable
from fpcn_dist.distill.plan import Group, make_plan
from fpcn_dist.distill.table import write_results
from fpcn_dist.distributed import CPU
from fpcn_dist.errors import UserError
from fpcn_dist.export import WEIGHTS
from fpcn_dist.files import make_folder, write_text
from fpcn_dist.lock import locked
from fpcn_dist.models import build_backbone
from fpcn_dist.onnx_export import FP32_FILE, export_onnx
from fpcn_dist.rundir import RunFolder
from fpcn_dist.teacher import name_teacher, open_teacher

_ATTEMPTS = 3
"""How often a run may fail without getting any further."""


def distill(
    recipe: Recipe,
    data: Path,
    output: Path,
    *,
    students: Sequence[str],
    baselines: bool = False,
    address: str | None = None,
    gpus: int | None = None,
    dry_run: bool = False,
) -> None:
    """Train every student of a teacher, side by side; leave run folders, exported models and a report in ``output``.

    Args:
        recipe: of each student, of task "distill", with its teacher; ``model.backbone`` is the student's name.
        data: the image folder.
        output: folder for all of them, on storage that every node sees.
        students: names of networks.
        baselines: also train each without the teacher.
        address: of a Ray cluster; ``None`` starts one on this machine.
        gpus: how many GPUs to use; ``None`` is all.
        dry_run: print the plan, and do nothing.

    Raises:
        UserError: teacher, data, students or cluster do not fit; names what does not. Or, once all others are trained,
            measured and exported: some runs did not come to their end, or a model cannot be exported.
    """
    recipe = check_recipe(recipe, students)
    manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
    print(open_teacher(recipe, manifest, CPU), flush=True)
    with contextlib.ExitStack() as held:
        if not dry_run:
            make_folder(output)
            (output / "logs").mkdir(exist_ok=True)
            held.enter_context(locked(output))
            manifest.save(output / "manifest.json")
        ray = held.enter_context(connect_ray(address))
        slots = _limited(find_slots(ray), gpus)
        if recipe.distill.bank is None:
            updated = recipe.distill.model_copy(update={"bank": str((output / "bank").resolve())})
            recipe = recipe.model_copy(update={"distill": updated})
        runs = _run_recipes(recipe, students, baselines, threads=slots.cpus)
        failures, unfinished = _survey(output, runs)
        costs = dict.fromkeys(unfinished, 0.0)
        if slots.count > 1:  # on a single place there is nothing to weigh up
            todo = {name: runs[name] for name in unfinished}
            costs = _measure(ray, slots, todo, len(manifest.classes), output, dry_run)
        batch_size = (recipe.data.classes_per_batch or len(manifest.classes)) * recipe.data.images_per_class
        plan = make_plan(costs, slots.count, batch_size) if costs else []
        _show(plan, slots, skipped=len(runs) - len(unfinished))
        if dry_run:
            return
        if plan and recipe.distill.teacher_mode == "bank":
            write_bank(ray, slots, recipe, manifest, output)
        if plan:
            failures |= _Driver(ray, slots, runs, output).run(plan)
    _finish(recipe, output, students, failures, baselines)


def check_recipe(recipe: Recipe, students: Sequence[str]) -> Recipe:
    """``recipe`` with its teacher found.

    Raises:
        UserError: there is none, or see :func:`check_students`.
    """
    check_students(recipe, students)
    if recipe.distill.teacher is not None:
        absolute = str(Path(recipe.distill.teacher).resolve())
        recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"teacher": absolute})})
    return name_teacher(recipe)


def check_students(recipe: Recipe, students: Sequence[str]) -> None:
    """Refuse students that cannot be trained together by this recipe.

    Raises:
        UserError: names what does not fit.
    """
    if recipe.task != "distill":
        mend = "use launch/recipes/distill.yaml, or set task to 'distill'"
        raise UserError("task", recipe.task, "students are trained by task 'distill'", mend)
    if recipe.engine.name != "ddp":
        reason = "students that share ranks are trained by DDP"
        raise UserError("engine.name", recipe.engine.name, reason, "set it to 'ddp'")
    twice = [name for name in students if list(students).count(name) > 1]
    if twice or not students:
        reason = f"{twice[0]} is named twice" if twice else "no student is named"
        raise UserError("--students", ",".join(students) or None, reason, "name each student once")
    for student in students:
        _require_seeing(student, recipe)


def _require_seeing(student: str, recipe: Recipe) -> None:
    """Refuse an unknown network, or one that cannot see images of the recipe's size."""
    backbone, size = build_backbone(student, norm=recipe.model.norm).eval(), recipe.data.crop
    try:
        with torch.inference_mode():
            backbone(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = f"it cannot see images of {size} px ({' '.join(str(error).split())[:200]})"
        raise UserError("--students", student, reason, "leave it out, or change data.crop, the teacher's too") from None


def _limited(slots: Slots, gpus: int | None) -> Slots:
    if gpus is None:
        return slots
    have = slots.count if slots.kind == "GPU" else 0
    if not 1 <= gpus <= have:
        mend = f"give 1 to {have}" if have else "leave --gpus out to train on CPUs"
        raise UserError("--gpus", gpus, f"the cluster has {have} GPU(s)", mend)
    return slots._replace(count=gpus)


def _run_recipes(recipe: Recipe, students: Sequence[str], baselines: bool, threads: int) -> dict[str, Recipe]:
    data = recipe.data.model_copy(update={"threads": recipe.data.threads or max(1, threads)})
    runs = {}
    for student in students:
        model = recipe.model.model_copy(update={"backbone": student})
        runs[student] = recipe.model_copy(update={"name": student, "model": model, "data": data})
        if baselines:
            update = {"name": student + BASELINE, "task": "classify"}
            runs[student + BASELINE] = runs[student].model_copy(update=update)
    return runs


def _survey(output: Path, runs: dict[str, Recipe]) -> tuple[dict[str, str], list[str]]:
    """Why runs of an earlier call stopped for good, and the names of those that are not at their end."""
    failures, unfinished = {}, []
    for name, recipe in runs.items():
        run = RunFolder(output / name)
        state, reason = run.read_outcome()
        same = run.recipe.is_file() and _what_counts(load_recipe(run.recipe)) == _what_counts(recipe)
        if state == "diverged" and same:
            failures[name] = reason or state
        elif state != "finished" or not same:
            unfinished.append(name)
    return failures, unfinished


def _what_counts(recipe: Recipe) -> Recipe:
    """Without what may be another on another cluster, or after a folder has moved."""
    data = recipe.data.model_copy(update={"threads": None})
    distill = recipe.distill.model_copy(update={"teacher": None, "bank": None})
    return recipe.model_copy(update={"data": data, "distill": distill})


def _measure(
    ray: Any, slots: Slots, runs: dict[str, Recipe], classes: int, output: Path, dry_run: bool
) -> dict[str, float]:
    """Seconds of a step on one place, by run; what was measured before on such a place is taken from costs.json."""
    path, known = output / "costs.json", {}
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = {}  # of an interrupted disk; they are measured again
    keys = {
        name: f"{recipe.model.backbone}, crop {recipe.data.crop}, {recipe.train.precision}, {slots.bundle}"
        for name, recipe in runs.items()
    }
    measure = ray.remote(worker.step_seconds).options(**slots.options, max_retries=2)
    pending = {keys[name]: recipe for name, recipe in runs.items() if keys[name] not in known}
    tasks = {key: measure.remote(recipe.model_dump(), classes) for key, recipe in pending.items()}
    for key, task in tasks.items():
        known[key] = task_result(ray, task)
    if tasks and not dry_run:
        write_text(path, json.dumps(known, indent=2) + "\n")
    return {name: known[key] for name, key in keys.items()}


def _show(plan: Sequence[Group], slots: Slots, skipped: int) -> None:
    place = "GPU" if slots.kind == "GPU" else f"node of {slots.cpus} CPU core(s)"
    table = Table("group", "runs", f"ranks (one {place} each)", "s/step", title="Plan", title_justify="left")
    for number, group in enumerate(plan):
        table.add_row(
            str(number), ", ".join(group.runs), str(group.ranks), f"{group.seconds:.3g}" if group.seconds else "-"
        )
    console = Console(soft_wrap=True)
    if plan:
        console.print(table)
    used = sum(group.ranks for group in plan)
    console.print(f"{used} of {slots.count} place(s) used; {skipped} run(s) at their end already", highlight=False)


def _finish(recipe: Recipe, output: Path, students: Sequence[str], failures: dict[str, str], baselines: bool) -> None:
    """Export the students, measure them beside the teacher, and say what is missing."""
    assert recipe.distill.teacher is not None
    problems = [f"{name}: {reason}" for name, reason in failures.items()]
    for student in students:
        try:
            if student not in failures and not _is_exported(output / student):
                export_onnx(output / student)
        except UserError as error:
            problems.append(f"{student} is trained but not exported: {error}")
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    write_results(output, students, Path(recipe.distill.teacher), failures, device, baselines=baselines)
    if problems:
        mend = f"see {output / 'logs'}; the same command goes on with them"
        raise UserError("students", None, " | ".join(problems), mend)


def _is_exported(run: Path) -> bool:
    weights, model = run / WEIGHTS, run / FP32_FILE
    return model.is_file() and model.stat().st_mtime >= weights.stat().st_mtime


@dataclasses.dataclass
class _Progress:
    """How often a run has failed, and how far it had come."""

    attempts: int = 0
    step: int = -1


class _Driver:
    """Runs groups side by side until each run is finished or given up."""

    def __init__(self, ray: Any, slots: Slots, runs: dict[str, Recipe], output: Path) -> None:
        self.ray, self.slots, self.runs, self.output = ray, slots, runs, output.resolve()
        self.progress = {name: _Progress() for name in runs}
        self.failures: dict[str, str] = {}
        self.queue: deque[Group] = deque()

    def run(self, plan: Sequence[Group]) -> dict[str, str]:
        """Why each run that did not come to its end stopped, by name."""
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
        log = str(self.output / "logs" / f"{'+'.join(group.runs)[:100]}-rank{{rank}}.log")
        return RunningGroup(self.ray, group, self.slots, recipes, str(self.output / "manifest.json"), log)

    def _ended(self, running: Sequence[RunningGroup]) -> list[RunningGroup]:
        """Those of which a rank has ended; waits a second for one."""
        tasks = [task for group in running for task in group.tasks] or [group.placed for group in running]
        done, _ = self.ray.wait(tasks, num_returns=1, timeout=1.0)
        return [group for group in running if set(group.tasks) & set(done)]

    def _settle(self, ended: RunningGroup) -> dict[str, str]:
        """What became of each run of a group; those that may try again are queued."""
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
