"""The training loop: one for every task, engine, number of ranks and number of networks. Read it from top to bottom."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import Replacement, TrainLoader
from fpcn_dist.deploy.onnx_backbone import with_frozen_backbone
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.evaluation import Evaluator
from fpcn_dist.runs.finish import finish_run
from fpcn_dist.runs.folder import LOG_FILE, RunFolder, open_together, owning
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.errors import NotFinite, Preempted, UserError
from fpcn_dist.runtime.output import Log, outliving_readers
from fpcn_dist.runtime.preemption import Preemption
from fpcn_dist.runtime.ranks import Ranks, use_threads
from fpcn_dist.training.probe import probe_run
from fpcn_dist.training.profiler import profiled
from fpcn_dist.training.progress import Progress
from fpcn_dist.training.run import TrainingRun
from fpcn_dist.training.schedule import Schedule
from fpcn_dist.training.soft_labels.attach import attach_teacher
from fpcn_dist.training.soft_labels.bank import SoftLabelBank
from fpcn_dist.training.start import Start, begin_run, prepare_data, settle_start

Watch = Callable[[Path, float, float], None]
"""Called on the first rank after each evaluation with run folder, epoch and validation accuracy."""
OnlineTeacher = Callable[[Batch], Batch]
"""Adds a teacher's logits to a batch."""


def train(
    recipe: Recipe,
    data: Address,
    output: Path,
    ranks: Ranks,
    *,
    resume: str = "auto",
    extend: bool = False,
    profile: bool = False,
    preemption: Preemption | None = None,
) -> None:
    """Train ``recipe`` on the image folder ``data`` and leave model, metrics and report in ``output``.

    Args:
        recipe: what to compute.
        data: ``DIR/<class>/*.jpg``, with or without train/, val/ and test/ above the classes.
        output: the run folder, on storage that all ranks see.
        ranks: this process among all.
        resume: ``"auto"`` goes on from the newest whole checkpoint in ``output``, if there is one; ``"never"`` begins
            again, and moves what is there to ``output``/previous/; ``"best"`` is the best checkpoint in ``output``;
            anything else is the path of a checkpoint, or of a run whose newest it is. The last three count for the
            first start of a command: when it is given again, or its launcher starts it again, it goes on.
        extend: go on for more epochs than the run was planned for, at the learning rates of the longer plan.
        profile: write a trace of a few early steps to ``output``/profile/.
        preemption: whose signals end the training after a step.

    Raises:
        UserError: whatever is wrong with the data, the recipe, the folder or a checkpoint; a loss that is not finite;
            another process that is writing to the folder. What is found before the first step changes nothing there.
        Preempted: a signal has ended it.
    """
    log = Log() if ranks.first else None
    with outliving_readers(log), owning(output, ranks):
        train_together(
            {output: recipe},
            data,
            ranks,
            resume=resume,
            extend=extend,
            profile=profile,
            preemption=preemption,
            probe=True,
            begun=lambda: log.begin(output / LOG_FILE) if log is not None else None,
        )


def train_together(
    recipes: Mapping[Path, Recipe],
    data: Address | Manifest,
    ranks: Ranks,
    *,
    resume: str = "auto",
    extend: bool = False,
    profile: bool = False,
    watch: Watch | None = None,
    preemption: Preemption | None = None,
    evaluate: bool = True,
    probe: bool = False,
    begun: Callable[[], None] = lambda: None,
) -> dict[Path, str]:
    """Train several recipes at once, on the same decoded batches, each as if it were trained alone.

    Each goes on from its own newest checkpoint; one that is finished stays as it is. One whose loss stops being finite
    is stopped, and on a single rank one that raises anything else, too; the others go on unharmed.

    Args:
        recipes: by run folder; they agree in seed, data, epochs and teacher.
        data: the image folder; or a manifest, whose images are not checked again.
        ranks, resume, extend, profile, preemption: see :func:`train`.
        watch: may end the training by raising.
        evaluate: whether the models of those that come to their end are evaluated image by image and reported, or are
            exported alone.
        probe: print and keep the bar that each pretrained network has to beat (:mod:`fpcn_dist.training.probe`).
        begun: called once the run folders belong to these trainings, unless all of them are finished.

    Returns:
        Why each of those stopped that did not come to their end, by run folder; also in its outcome.json.

    Raises:
        UserError, Preempted: see :func:`train`. Before the first step whatever is wrong with one recipe stops all.
    """
    plan = _plan(recipes, data, ranks, resume, extend)
    if not plan.starts:
        return {}
    loader, batches, trainings = _set_up(plan, ranks)
    begun()
    for training in trainings if probe else []:
        probe_run(training)
    first_step, total = min(training.first_step for training in trainings), trainings[0].schedule.total
    with (
        contextlib.ExitStack() as written,
        contextlib.closing(loader),
        Progress(total, start_step=first_step, rank=ranks.rank) as progress,
        profiled(trainings[0].run.path, ranks, profile) as tick,
    ):
        for training in trainings:  # whatever happens, the last checkpoints get whole
            written.callback(training.finish_writing)
        reported = 0
        for step in range(first_step, total):
            batch, waited = _next(batches, plan.teacher)
            for training in _active(trainings, step):
                with _isolated(training, trainings):
                    training.train(batch, step, waited)
            progress.advance(step + 1)
            tick()

            stop = preemption.agreed() if preemption is not None else None
            due = [t for t in _active(trainings, step) if stop or t.schedule.logs(step + 1)]
            if due:
                _note_replaced(ranks.gather(loader.replaced[reported:]), _active(trainings, step), progress)
                reported = len(loader.replaced)
                _log_point(due, trainings, step + 1, progress, watch, save=stop is not None)
            if stop is not None and step + 1 < total:
                raise Preempted(stop, f"after step {step + 1}, with a checkpoint")
            if not _active(trainings, step) and all(t.first_step <= step for t in trainings):
                break
        for training in _active(trainings, total):
            with _isolated(training, trainings):
                training.close()
    _finish(trainings, total, evaluate=evaluate)
    return {training.run.path: training.failure for training in trainings if training.failure is not None}


class _Plan(NamedTuple):
    """What trains on which images, before anything is built or written."""

    manifest: Manifest
    shared: Recipe
    starts: dict[Path, Start]
    soft_labels: SoftLabelBank | None
    teacher: OnlineTeacher | None

    def loader(self, ranks: Ranks) -> TrainLoader:
        """This rank's batches, from the first step on that any of the trainings takes part in."""
        return TrainLoader(
            self.manifest,
            self.shared.data,
            self.shared.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            start_step=min(start.step for start in self.starts.values()),
            soft_labels=self.soft_labels,
        )


def _plan(recipes: Mapping[Path, Recipe], data: Address | Manifest, ranks: Ranks, resume: str, extend: bool) -> _Plan:
    """Check recipes and data, and settle where each training starts that has not come to its end. Collective."""
    shared = _require_agreement(list(recipes.values()))
    runs = [RunFolder(output) for output in recipes]
    for run in runs:
        open_together(run, ranks)
    manifest = prepare_data(data, shared, ranks)
    found = {run.path: settle_start(run, recipes[run.path], manifest, ranks, resume, extend=extend) for run in runs}
    starts = {path: start for path, start in found.items() if not start.finished}
    if not starts:
        return _Plan(manifest, shared, starts, None, None)
    # What recipes leave to their networks may differ, too.
    chosen = [start.recipe for start in starts.values()]
    shared = _require_agreement(chosen)
    use_threads(shared.data.threads, ranks.device)
    return _Plan(manifest, shared, starts, *attach_teacher(chosen, runs[0].path, manifest, ranks))


def _set_up(plan: _Plan, ranks: Ranks) -> tuple[TrainLoader, Iterator[Batch], list[TrainingRun]]:
    """The trainings, and their batches. Nothing in a folder changes before the networks are built and a batch decoded.

    The checkpoints that the trainings go on from are in memory no longer than it takes to fill their engines.
    """
    loader, trainings = plan.loader(ranks), []
    for path, start in plan.starts.items():
        _require_even_parts(loader.batch_size // ranks.world_size, start.recipe.train.micro_batches)
        schedule = Schedule.of(start.recipe, loader.batch_size, loader.steps_per_epoch)
        trainings.append(TrainingRun(RunFolder(path), start, plan.manifest, ranks, schedule))
    first_step, batches = min(training.first_step for training in trainings), iter(loader)
    if first_step < trainings[0].schedule.total:
        batches = itertools.chain([next(batches)], batches)
    for training, start in zip(trainings, plan.starts.values(), strict=True):
        begin_run(training.run, start, plan.manifest, ranks)
        training.begin()
    images_from = min(training.images_from for training in trainings)
    if plan.teacher is None and images_from > first_step:  # their features were computed
        loader.close()
        loader = plan.loader(ranks)
        loader.images_from = images_from
        batches = iter(loader)
    return loader, batches, trainings


def _next(batches: Iterator[Batch], teacher: OnlineTeacher | None) -> tuple[Batch, float]:
    """The next batch, with the teacher's logits where it computes them now; and the seconds that it took."""
    began = time.perf_counter()
    batch = next(batches)
    if teacher is not None:
        batch = teacher(batch)
    return batch, time.perf_counter() - began


def _note_replaced(replaced: Sequence[Replacement], trainings: Sequence[TrainingRun], progress: Progress) -> None:
    """Show which files turned unreadable on any rank, and let each training record them at its next log point."""
    for file in replaced:
        progress.print(f"warning: {file.path} {file.reason}; another image is shown in its place")
        for training in trainings:
            training.replaced.append(file)


def _log_point(
    due: Sequence[TrainingRun],
    trainings: Sequence[TrainingRun],
    done: int,
    progress: Progress,
    watch: Watch | None,
    *,
    save: bool,
) -> None:
    """Record, evaluate and save those of the trainings that are due after ``done`` steps. Collective."""
    for training in due:
        with _isolated(training, trainings):
            name = training.run.path.name if len(trainings) > 1 else ""
            progress.update(done, training.epoch(done), training.log(done), name=name)
    accuracies = _validate([t for t in _active(due, done) if t.schedule.evaluates(done)], trainings, done, progress)
    for training in _active(due, done):
        with _isolated(training, trainings):
            accuracy = accuracies.get(training)
            training.save(done, accuracy, at_save_point=save or training.schedule.saves(done))
            training.meter.restart_clock()
            if watch is not None and accuracy is not None and training.ranks.first:
                watch(training.run.path, training.epoch(done), accuracy)


def _validate(
    due: Sequence[TrainingRun], trainings: Sequence[TrainingRun], done: int, progress: Progress
) -> dict[TrainingRun, float]:
    """Validation accuracies of ``due``, all measured on the same decoded batches; none without such images."""
    if not due or not len(due[0].manifest.ids("val")):
        return {}
    evaluators: dict[TrainingRun, Evaluator] = {}
    for training in due:
        with _isolated(training, trainings):
            evaluators[training] = training.begin_validation()
    for training in _active(due, done):
        if training.features is not None:
            with _isolated(training, trainings):
                for pooled, share, labels in training.features.validation():
                    evaluators[training].update_pooled(pooled, share, labels)
    looking = [training for training in _active(due, done) if training.features is None]
    for batch in looking[0].validation_images() if looking else ():
        for training in _active(looking, done):
            with _isolated(training, trainings):
                evaluators[training].update(batch)
    accuracies = {}
    for training in _active(due, done):
        with _isolated(training, trainings):
            scores = training.end_validation(evaluators[training], done)
            accuracies[training] = scores.accuracy
            name = f"{training.run.path.name}: " if len(trainings) > 1 else ""
            numbers = f"validation accuracy {100 * scores.accuracy:.1f} %, loss {scores.loss:.4f}"
            progress.print(f"{name}epoch {training.epoch(done):g}: {numbers}")
    return accuracies


def _finish(trainings: Sequence[TrainingRun], total: int, *, evaluate: bool) -> None:
    """Export, evaluate and report those that came to their end. Collective."""
    for training in _active(trainings, total):
        with _isolated(training, trainings):
            finish_run(training.run, training.checkpoints, training.ranks, with_frozen_backbone, evaluate=evaluate)
            training.ranks.on_first(lambda run=training.run: run.set_outcome("finished"))


def _active(trainings: Sequence[TrainingRun], step: int) -> list[TrainingRun]:
    """Those that take part in ``step``."""
    return [training for training in trainings if training.failure is None and training.first_step <= step]


@contextlib.contextmanager
def _isolated(training: TrainingRun, trainings: Sequence[TrainingRun]):
    """Let the others go on where one of several fails, as far as ranks can still agree on what happened.

    A loss that is not finite is found by all ranks at once. Anything else may have happened on one rank alone, whose
    collectives the others would wait for: then all must end, and go on from their checkpoints.
    """
    try:
        yield
    except Exception as error:
        if len(trainings) == 1 or (training.ranks.world_size > 1 and not isinstance(error, NotFinite)):
            raise
        state = "diverged" if isinstance(error, NotFinite) else "failed"
        training.stop(state, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")


def _require_agreement(recipes: Sequence[Recipe]) -> Recipe:
    """What all recipes must have alike to share batches; gives one of them to read it from."""
    first = recipes[0]
    for recipe in recipes[1:]:
        for field in ("seed", "data"):
            if getattr(recipe, field) != getattr(first, field):
                raise UserError(field, None, "differs between recipes that share batches", "make it the same in all")
        if recipe.train.epochs != first.train.epochs:
            reason = f"another recipe that shares its batches has {first.train.epochs}"
            raise UserError("train.epochs", recipe.train.epochs, reason, "make it the same in all")
    return first


def _require_even_parts(share: int, micro_batches: int) -> None:
    if share % micro_batches:
        fitting = [parts for parts in range(1, share + 1) if share % parts == 0]
        near = min(fitting, key=lambda parts: (abs(parts - micro_batches), parts))
        reason = f"does not divide the {share} images of a rank"
        raise UserError("train.micro_batches", micro_batches, reason, f"try {near}")
