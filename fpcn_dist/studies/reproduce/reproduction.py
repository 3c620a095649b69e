"""A reproduction from beginning to end: the grid of runs on a Ray cluster, the distillation, the report.

All that must outlive this process lies in the output folder: finished runs are skipped when the same command is given
again, the others go on from their checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.notices import show_notices
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.recipe.section import flat
from fpcn_dist.runs.description import describe
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder
from fpcn_dist.runtime.lock import locked
from fpcn_dist.runtime.terminal import Terminal
from fpcn_dist.studies.cluster import Slots, connect_ray, find_slots
from fpcn_dist.studies.cluster.fleet import Fleet, measure_steps, survey
from fpcn_dist.studies.cluster.plan import Group
from fpcn_dist.studies.distill.distillation import distill
from fpcn_dist.studies.reproduce.collect import RUNS, collect, students_folder
from fpcn_dist.studies.reproduce.estimate import Estimate, bank_seconds, run_seconds
from fpcn_dist.studies.reproduce.experiments import Grid, Scale, run_name
from fpcn_dist.studies.reproduce.report import build_reproduction_report
from fpcn_dist.training.soft_labels.students import check_students, student_name

REPRODUCTION_FILE = "reproduction.json"


@dataclasses.dataclass(frozen=True)
class ReproductionRequest:
    """What is to be reproduced.

    Attributes:
        recipe: the recipe of FPCN.
        systems: folder of the recipes of the compared systems.
        scale: "tiny" or "paper".
        sections: some of :data:`fpcn_dist.studies.reproduce.experiments.SECTIONS`.
        seeds: how many trainings of each, on the same images.
        students: networks of Table 4.
    """

    recipe: Recipe
    systems: Path
    scale: Scale
    sections: tuple[str, ...]
    seeds: int
    students: tuple[str, ...]


def reproduce(
    request: ReproductionRequest, data: Address, output: Path, *, address: str | None = None, yes: bool = False
) -> None:
    """Train and measure all that the sections need; leave run folders, results and a report in ``output``.

    Args:
        request: what is asked for.
        data: the image folder.
        output: folder for everything, on storage that every node sees.
        address: the address of a Ray cluster; ``None`` starts one on this machine.
        yes: do not ask whether to begin.

    Raises:
        UserError: the request, the data or the cluster do not fit; names what does not. Or, once all others have come
            to their end and the report is written: some runs have no result.
    """
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        raise UserError("--yes", None, "nobody is there to be asked whether to begin", "give --yes to begin at once")
    if request.seeds < 1:
        raise UserError("--seeds", request.seeds, "leaves nothing to train", "give 1 or more")
    recipe, output = request.recipe, output.resolve()
    manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
    show_notices(manifest.refused, manifest.notices)
    seeds = range(recipe.seed, recipe.seed + request.seeds)
    grid = Grid(recipe, request.systems, request.scale, request.sections, seeds, len(manifest.classes))
    if "table4" in request.sections:
        check_students(grid.student(recipe.seed, output), request.students)
    with contextlib.ExitStack() as held:
        failures = _train(grid, request.students, manifest, output, held, address=address, yes=yes)
        if failures is None:
            print("nothing was started", flush=True)
            return
        if "table4" in request.sections:
            failures |= _distill(grid, request.students, data, output, address)
        results = collect(grid, manifest, output, request.students, failures)
        results.save(output)
        report = build_reproduction_report(output, results)
        Terminal().print(f"report {report}")
    if failures:
        problems = " | ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise UserError("runs", None, problems, f"see {output / RUNS / 'logs'}; the same command goes on with them")


def _open(output: Path, grid: Grid, manifest: Manifest) -> None:
    """Describe the reproduction in an empty folder, or see that the folder holds the same one.

    More sections, seeds and students may come to a reproduction. The caller holds the lock of the folder.

    Raises:
        UserError: the folder holds something else.
    """
    now = {"scale": grid.scale, "data": manifest.hash, **flat(grid.base.model_dump())}
    describe(output, REPRODUCTION_FILE, now, "a reproduction", free={"data.threads"})
    (output / RUNS / "logs").mkdir(parents=True, exist_ok=True)
    manifest.save(output / RUNS / "manifest.json")


def _train(
    grid: Grid,
    students: Sequence[str],
    manifest: Manifest,
    output: Path,
    held: contextlib.ExitStack,
    *,
    address: str | None,
    yes: bool,
) -> dict[str, str] | None:
    """Why each run without a result has none, by name; ``None`` where the user would rather not begin.

    From here on ``held`` keeps others out of the folder.
    """
    with connect_ray(address) as ray:
        slots = find_slots(ray, cpus=grid.base.data.threads or 1)
        make_folder(output)
        held.enter_context(locked(output))
        _open(output, grid, manifest)
        runs = {name: _with_threads(recipe, slots.cpus) for name, recipe in grid.runs.items()}
        failures, unfinished = survey(output / RUNS, runs)
        estimate = _estimate(ray, slots, grid, runs, unfinished, students, manifest, output)
        if estimate.seconds:
            estimate.show(slots, len(runs) - len(unfinished), Terminal())
            if not yes and input("Begin? [y/N] ").strip().lower() not in ("y", "yes"):
                return None
        costs = {name: estimate.seconds[name] for name in unfinished}
        # The longest first: the short ones fill the gaps at the end.
        plan = [Group((name,), 1, costs[name]) for name in sorted(costs, key=lambda name: -costs[name])]
        if plan:
            failures |= Fleet(ray, slots, runs, output / RUNS).run(plan)
    for name in runs:
        run = RunFolder(output / RUNS / name)
        if run.read_outcome()[0] == "finished":  # whose model is kept, and its checkpoints are many gigabytes in all
            shutil.rmtree(run.checkpoints, ignore_errors=True)
    return failures


def _with_threads(recipe: Recipe, threads: int) -> Recipe:
    return recipe.changed(**{"data.threads": max(1, threads)})


def _estimate(
    ray: Any,
    slots: Slots,
    grid: Grid,
    runs: dict[str, Recipe],
    unfinished: Sequence[str],
    students: Sequence[str],
    manifest: Manifest,
    output: Path,
) -> Estimate:
    """Estimate the time of all that has not come to its end: single runs, and the distillation of each seed."""
    todo = {name: runs[name] for name in unfinished}
    taught: dict[str, dict[str, Recipe]] = {}
    for seed in grid.seeds if "table4" in grid.sections else ():
        folder = students_folder(output, seed)
        missing = [name for name in students if RunFolder(folder / student_name(name)).read_outcome()[0] != "finished"]
        student = _with_threads(grid.student(seed, folder), slots.cpus)
        taught[folder.name] = {name: student.changed(**{"model.backbone": name}) for name in missing}
    asked = todo | {f"student {name}": recipe for named in taught.values() for name, recipe in named.items()}
    if any(taught.values()):
        asked["teacher"] = runs[run_name("fpcn", grid.seeds[0])]
    steps = measure_steps(ray, slots, asked, len(manifest.classes), output / RUNS, dry_run=False)
    seconds = {name: run_seconds(steps[name], recipe, manifest) for name, recipe in todo.items()}
    for folder, named in taught.items():
        if named:  # each with its baseline, after the teacher's looks
            both = [2 * run_seconds(steps[f"student {name}"], recipe, manifest) for name, recipe in named.items()]
            seconds[folder] = sum(both) + bank_seconds(steps["teacher"], next(iter(named.values())), manifest)
    return Estimate(seconds, slots.count)


def _distill(grid: Grid, students: Sequence[str], data: Address, output: Path, address: str | None) -> dict[str, str]:
    """Table 4: the students of each seed's FPCN, and their baselines; what went wrong, by seed."""
    failures = {}
    for seed in grid.seeds:
        folder, teacher = students_folder(output, seed), RunFolder(output / RUNS / run_name("fpcn", seed))
        if teacher.read_outcome()[0] != "finished":
            failures[folder.name] = "there is no teacher"
            continue
        try:
            distill(grid.student(seed, teacher.path), data, folder, students=students, baselines=True, address=address)
        except UserError as error:
            failures[folder.name] = str(error)
    return failures
