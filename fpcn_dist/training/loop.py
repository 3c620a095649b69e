"""The training loop: one for every task, engine, number of ranks and number of networks. Read it from top to bottom."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fpcn_dist.data.loader import TrainLoader
from fpcn_dist.data.manifest import Manifest
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.finish import finish_run
from fpcn_dist.runs.folder import RunFolder, owning
from fpcn_dist.runtime.errors import NotFinite, Preempted, UserError
from fpcn_dist.runtime.preemption import Preemption
from fpcn_dist.runtime.ranks import Ranks, use_threads
from fpcn_dist.training.profiler import profiled
from fpcn_dist.training.progress import Progress
from fpcn_dist.training.run import TrainingRun
from fpcn_dist.training.schedule import Schedule
from fpcn_dist.training.soft_labels.attach import attach_teacher
from fpcn_dist.training.start import open_run, prepare_data

Watch = Callable[[Path, float, float], None]
"""Called on the first rank after each evaluation with run folder, epoch and validation accuracy."""


def train(
    recipe: Recipe,
    data: Path,
    output: Path,
    ranks: Ranks,
    *,
    resume: str = "auto",
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
            again; anything else is the path of a checkpoint.
        profile: write a trace of a few early steps to ``output``/profile/.
        preemption: whose signals end the training after a step.

    Raises:
        UserError: whatever is wrong with the data, the recipe, the folder or a checkpoint; a loss that is not finite;
            another process that is writing to the folder.
        Preempted: a signal has ended it.
    """
    with owning(output, ranks):
        train_together({output: recipe}, data, ranks, resume=resume, profile=profile, preemption=preemption)


def train_together(
    recipes: Mapping[Path, Recipe],
    data: Path | Manifest,
    ranks: Ranks,
    *,
    resume: str = "auto",
    profile: bool = False,
    watch: Watch | None = None,
    preemption: Preemption | None = None,
) -> dict[Path, str]:
    """Train several recipes at once, on the same decoded batches, each as if it were trained alone.

    Each goes on from its own newest checkpoint. One whose loss stops being finite is stopped, and on a single rank one
    that raises anything else, too; the others go on unharmed.

    Args:
        recipes: by run folder; they agree in seed, data, epochs and teacher.
        data: the image folder; or a manifest, whose images are not checked again.
        ranks, resume, profile, preemption: see :func:`train`.
        watch: may end the training by raising.

    Returns:
        Why each of those stopped that did not come to their end, by run folder; also in its outcome.json.

    Raises:
        UserError, Preempted: see :func:`train`. Before the first step whatever is wrong with one recipe stops all.
    """
    shared = _require_agreement(list(recipes.values()))
    runs = [RunFolder(output) for output in recipes]
    manifest = prepare_data(data, shared, ranks)
    starts = [
        open_run(run, recipe, manifest, ranks, resume) for run, recipe in zip(runs, recipes.values(), strict=True)
    ]
    use_threads(shared.data.threads, ranks.device)
    soft_labels, teacher = attach_teacher([start.recipe for start in starts], runs[0].path, manifest, ranks)

    start_step = min(start.step for start in starts)
    loader = TrainLoader(
        manifest, shared.data, shared.seed, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device,
        start_step=start_step, soft_labels=soft_labels,
    )  # fmt: skip
    trainees = []
    for run, start in zip(runs, starts, strict=True):
        _require_even_parts(loader.batch_size // ranks.world_size, start.recipe.train.micro_batches)
        schedule = Schedule.of(start.recipe, loader.batch_size, loader.steps_per_epoch)
        trainees.append(TrainingRun(run, start, manifest, ranks, schedule))
    del starts, start  # their states are in the engines now, and need no second copy
    total = trainees[0].schedule.total
    progress = Progress(total, start_step=start_step, rank=ranks.rank)

    with (
        contextlib.ExitStack() as written,
        contextlib.closing(loader),
        progress,
        profiled(runs[0].path, ranks, profile) as tick,
    ):
        for trainee in trainees:  # whatever happens, the last checkpoints get whole
            written.callback(trainee.finish_writing)
        batches, reported = iter(loader), 0
        for step in range(start_step, total):
            began = time.perf_counter()
            batch = next(batches)
            if teacher is not None:
                batch = teacher(batch)
            waited = time.perf_counter() - began
            for trainee in _active(trainees, step):
                with _isolated(trainee, trainees):
                    trainee.train(batch, step, waited)
            progress.advance(step + 1)
            tick()

            done = step + 1
            stop = preemption.agreed() if preemption is not None else None
            logging = [trainee for trainee in _active(trainees, step) if stop or trainee.schedule.logs(done)]
            if logging:
                for replaced in ranks.gather(loader.replaced[reported:]):
                    progress.print(f"warning: {replaced.path} {replaced.reason}; another image is shown in its place")
                    for trainee in _active(trainees, step):
                        trainee.replaced.append(replaced)
                reported = len(loader.replaced)
            for trainee in logging:
                with _isolated(trainee, trainees):
                    name = "" if len(runs) == 1 else trainee.run.path.name
                    accuracy = _log_point(trainee, done, progress, name, save=stop is not None)
                    if watch is not None and accuracy is not None and ranks.first:
                        watch(trainee.run.path, done / trainee.schedule.per_epoch, accuracy)
            if stop is not None and done < total:
                raise Preempted(stop, done)
            if not _active(trainees, step) and all(t.first_step <= step for t in trainees):
                break
        for trainee in _active(trainees, total):
            with _isolated(trainee, trainees):
                trainee.close()
    for trainee in _active(trainees, total):
        with _isolated(trainee, trainees):
            finish_run(trainee.run, trainee.checkpoints, ranks)
            ranks.on_first(lambda run=trainee.run: run.set_outcome("finished"))
    return {trainee.run.path: trainee.failure for trainee in trainees if trainee.failure is not None}


def _log_point(trainee: TrainingRun, done: int, progress: Progress, name: str, *, save: bool) -> float | None:
    """Record, evaluate and save as is due; gives the validation accuracy where that was measured."""
    schedule, prefix = trainee.schedule, f"{name}: " if name else ""
    progress.update(done, done / schedule.per_epoch, trainee.log(done), name=name)
    accuracy = None
    if schedule.evaluates(done) and len(trainee.manifest.ids("val")):
        scores = trainee.validate(done)
        accuracy = scores.accuracy
        epoch = f"{prefix}epoch {done / schedule.per_epoch:g}"
        progress.print(f"{epoch}: validation accuracy {100 * accuracy:.1f} %, loss {scores.loss:.4f}")
    trainee.save(done, accuracy, at_save_point=save or schedule.saves(done))
    trainee.meter.restart_clock()
    return accuracy


def _active(trainees: Sequence[TrainingRun], step: int) -> list[TrainingRun]:
    return [trainee for trainee in trainees if trainee.failure is None and trainee.first_step <= step]


@contextlib.contextmanager
def _isolated(trainee: TrainingRun, trainees: Sequence[TrainingRun]):
    """Let the others go on where one of several fails, as far as ranks can still agree on what happened.

    A loss that is not finite is found by all ranks at once. Anything else may have happened on one rank alone, whose
    collectives the others would wait for: then all must end, and go on from their checkpoints.
    """
    try:
        yield
    except Exception as error:
        if len(trainees) == 1 or (trainee.ranks.world_size > 1 and not isinstance(error, NotFinite)):
            raise
        state = "diverged" if isinstance(error, NotFinite) else "failed"
        trainee.stop(state, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")


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
        raise UserError(
            "train.micro_batches", micro_batches, f"does not divide the {share} images of a rank", f"try {near}"
        )
