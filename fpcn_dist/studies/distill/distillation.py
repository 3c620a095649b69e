"""Every student at once: plan, soft labels, groups of students on a Ray cluster, results.

All that must outlive this process lies in the output folder: finished students are skipped when the same command is
given again, the others go on from their checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.table import Table

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.notices import show_notices
from fpcn_dist.deploy.onnx_export import FP32_FILE, export_onnx
from fpcn_dist.models.cost import measure
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.model_folder import WEIGHTS, load_model
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder, write_text
from fpcn_dist.runtime.lock import locked
from fpcn_dist.runtime.ranks import CPU
from fpcn_dist.runtime.terminal import Terminal
from fpcn_dist.studies.cluster import Slots, connect_ray, find_slots
from fpcn_dist.studies.cluster.bank_job import write_bank
from fpcn_dist.studies.cluster.fleet import Fleet, measure_steps, survey
from fpcn_dist.studies.cluster.plan import Group, make_plan
from fpcn_dist.studies.distill import BASELINE
from fpcn_dist.studies.distill.report import build_distillation_report
from fpcn_dist.studies.distill.results import (
    DISTILLATION_FILE,
    DistillationResults,
    TeacherRow,
    device_name,
    read_student,
)
from fpcn_dist.training.soft_labels.students import check_recipe, student_name
from fpcn_dist.training.soft_labels.teacher import open_teacher, weights_sha256


def distill(
    recipe: Recipe,
    data: Address,
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
        recipe: the recipe of each student, of task "distill", with its teacher. The student's name takes the place of
            ``model.backbone``.
        data: the image folder.
        output: folder for all of them, on storage that every node sees.
        students: names of networks.
        baselines: also train each without the teacher.
        address: the address of a Ray cluster; ``None`` starts one on this machine.
        gpus: how many GPUs to use; ``None`` is all.
        dry_run: print the plan, and do nothing.

    Raises:
        UserError: teacher, data, students or cluster do not fit; names what does not. Or, once all others are trained,
            measured and exported: some runs did not come to their end, or a model cannot be exported.
    """
    recipe = check_recipe(recipe, students)
    manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
    show_notices(manifest.refused, manifest.notices)
    print(open_teacher(recipe, manifest, CPU), flush=True)
    with contextlib.ExitStack() as held:
        if not dry_run:
            make_folder(output)
            held.enter_context(locked(output))
            (output / "logs").mkdir(exist_ok=True)
            manifest.save(output / "manifest.json")
        ray = held.enter_context(connect_ray(address))
        slots = _limited(find_slots(ray), gpus)
        if recipe.distill.bank is None:
            recipe = recipe.changed(**{"distill.bank": str((output / "bank").resolve())})
        networks = {student_name(network): network for network in students}
        runs = _run_recipes(recipe, networks, baselines, threads=slots.cpus)
        failures, unfinished = survey(output, runs)
        costs = dict.fromkeys(unfinished, 0.0)
        if slots.count > 1:  # on a single place there is nothing to weigh up
            todo = {name: runs[name] for name in unfinished}
            costs = measure_steps(ray, slots, todo, len(manifest.classes), output, dry_run)
        batch_size = recipe.data.batch_size(len(manifest.classes))
        plan = make_plan(costs, slots.count, batch_size) if costs else []
        _show(plan, slots, skipped=len(runs) - len(unfinished))
        if dry_run:
            return
        if plan and recipe.distill.teacher_mode == "bank":
            write_bank(ray, slots, recipe, manifest, output)
        if plan:
            failures |= Fleet(ray, slots, runs, output).run(plan)
    _finish(recipe, output, list(networks), failures, baselines)


def _limited(slots: Slots, gpus: int | None) -> Slots:
    if gpus is None:
        return slots
    have = slots.count if slots.kind == "GPU" else 0
    if not 1 <= gpus <= have:
        hint = f"give 1 to {have}" if have else "leave --gpus out to train on CPUs"
        raise UserError("--gpus", gpus, f"the cluster has {have} GPU(s)", hint)
    return slots._replace(count=gpus)


def _run_recipes(recipe: Recipe, networks: Mapping[str, str], baselines: bool, threads: int) -> dict[str, Recipe]:
    """The recipe of each run by its name, of which ``networks`` tells the network."""
    recipe = recipe.changed(**{"data.threads": recipe.data.threads or max(1, threads)})
    runs = {}
    for student, network in networks.items():
        runs[student] = recipe.changed(**{"name": student, "model.backbone": network})
        if baselines:
            runs[student + BASELINE] = runs[student].changed(name=student + BASELINE, task="classify")
    return runs


def _show(plan: Sequence[Group], slots: Slots, skipped: int) -> None:
    place = "GPU" if slots.kind == "GPU" else f"node of {slots.cpus} CPU core(s)"
    table = Table("group", "runs", f"ranks (one {place} each)", "s/step", title="Plan", title_justify="left")
    for number, group in enumerate(plan):
        table.add_row(
            str(number), ", ".join(group.runs), str(group.ranks), f"{group.seconds:.3g}" if group.seconds else "-"
        )
    console = Terminal()
    if plan:
        console.print(table)
    used = sum(group.ranks for group in plan)
    console.print(f"{used} of {slots.count} place(s) used; {skipped} run(s) at their end already")


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
        hint = f"see {output / 'logs'}; the same command goes on with them"
        raise UserError("students", None, " | ".join(problems), hint)


def _is_exported(run: Path) -> bool:
    weights, model = run / WEIGHTS, run / FP32_FILE
    return model.is_file() and model.stat().st_mtime >= weights.stat().st_mtime


def write_results(
    output: Path,
    students: Sequence[str],
    teacher: Path,
    reasons: Mapping[str, str],
    device: torch.device,
    *,
    baselines: bool,
) -> None:
    """Measure all exported models, print the table, write distillation.json and report.html to ``output``.

    Args:
        output: folder of the students' run folders, which are called like the students, and of their baselines'.
        students: names of networks; each gets a row, in this order.
        teacher: run folder of the teacher.
        reasons: by the name of a run, why it has no result; what lies in its folder then does not count.
        device: where to measure.
        baselines: whether students were trained without the teacher, too.

    Raises:
        UserError: there is no model in the teacher's folder, or ``output`` cannot be written to.
    """
    model, info = load_model(teacher, device)
    size = info.preprocessing.crop
    cost = measure(model, size, device)
    first = TeacherRow(teacher, weights_sha256(teacher), info.model.backbone, size, cost, Evaluation.load(teacher))
    rows = tuple(read_student(output, name, reasons, device, baselines) for name in students)
    results = DistillationResults(first, rows, baselines, device_name(device))
    write_text(output / DISTILLATION_FILE, results.to_json() + "\n")
    report = build_distillation_report(output, results)
    _print(results, report)


def _print(results: DistillationResults, report: Path) -> None:
    table = Table(title="Distillation", title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("student", overflow="fold")
    for heading in results.headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(f"teacher ({results.teacher.backbone})", *results.cells(results.teacher), end_section=True)
    for row in results.students:
        table.add_row(row.name, *results.cells(row))
    console = Terminal()
    console.print(table)
    for row in results.students:
        for run, reason in row.reasons.items():
            console.print(f"{run} has no result: {reason}")
    console.print(results.caption)
    console.print(f"report {report}")
