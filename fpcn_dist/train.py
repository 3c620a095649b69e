"""The training loop: one for every task, engine and number of ranks. Read it from top to bottom."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fpcn_dist.checkpoint import CheckpointFolder, CheckpointInfo, read_checkpoint
from fpcn_dist.config import Recipe
from fpcn_dist.data.loader import EvalLoader, TrainLoader
from fpcn_dist.data.manifest import Manifest
from fpcn_dist.distributed import Ranks
from fpcn_dist.engine import build_engine, forward_backward
from fpcn_dist.errors import UserError
from fpcn_dist.evaluate import Evaluation, evaluate
from fpcn_dist.flops import model_flops, peak_flops
from fpcn_dist.keys import key
from fpcn_dist.meter import StepMeter
from fpcn_dist.metrics import MetricsLogger, Progress
from fpcn_dist.models import Classifier
from fpcn_dist.optim import learning_rate
from fpcn_dist.profiler import profiled
from fpcn_dist.results import finish_run
from fpcn_dist.rundir import RunFolder, start_run
from fpcn_dist.tasks import build_task


def train(
    recipe: Recipe, data: Path, output: Path, ranks: Ranks, *, resume: str = "auto", profile: bool = False
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

    Raises:
        UserError: whatever is wrong with the data, the recipe, the folder or a checkpoint; a loss that is not finite.
    """
    run = RunFolder(output)
    checkpoints = CheckpointFolder(run.checkpoints, keep=recipe.train.keep_checkpoints)
    checkpoint = ranks.on_first(lambda: start_run(run, checkpoints, recipe, data, ranks, resume))
    manifest = Manifest.load(run.manifest)
    state = read_checkpoint(Path(checkpoint))[0] if checkpoint else None
    start = state.step if state else 0
    best = checkpoints.best_accuracy() if state else None

    loader = TrainLoader(
        manifest, recipe.data, recipe.seed,
        rank=ranks.rank, world_size=ranks.world_size, device=ranks.device, start_step=start,
    )  # fmt: skip
    _require_even_parts(loader.batch_size // ranks.world_size, recipe.train.micro_batches)
    steps_per_epoch = loader.steps_per_epoch
    total_steps = recipe.train.epochs * steps_per_epoch
    frozen_steps = recipe.optim.freeze_backbone_epochs * steps_per_epoch
    save_every = recipe.train.checkpoint_every or steps_per_epoch
    eval_every = recipe.train.eval_every * steps_per_epoch

    task = build_task(recipe, len(manifest.classes), ranks.group)
    flops = 3 * model_flops(task.model, recipe.data.crop)
    engine = build_engine(recipe, task, ranks, frozen_backbone=start < frozen_steps, state=state)
    peak = peak_flops(ranks.device, recipe.train.precision)
    meter = StepMeter(ranks, loader.batch_size, flops_share=flops / peak / ranks.world_size if peak else None)
    logger = MetricsLogger(output, ranks.rank, start_step=start)
    progress = Progress(total_steps, start_step=start, rank=ranks.rank)

    with (
        contextlib.closing(loader),
        contextlib.closing(logger),
        progress,
        checkpoints,
        profiled(output, ranks, profile) as tick,
    ):
        batches, reported = iter(loader), 0
        for step in range(start, total_steps):
            if step == frozen_steps and step > start:  # the backbone thaws: a new engine takes the state over
                state = engine.state(step)
                engine.close()
                task = build_task(recipe, len(manifest.classes), ranks.group)
                engine = build_engine(recipe, task, ranks, state=state)

            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            torch.manual_seed(key(recipe.seed, step, ranks.rank))
            lr = learning_rate(recipe.optim, step, steps_per_epoch, total_steps)
            result = forward_backward(engine, batch, step, recipe.train.micro_batches)
            norm = engine.update(lr)
            meter.add(step + 1, batch, result, norm, lr, waited)
            progress.advance(step + 1)
            tick()

            done, last = step + 1, step + 1 == total_steps
            epoch = done / steps_per_epoch
            evaluate_now, save_now = last or done % eval_every == 0, last or done % save_every == 0
            if not (evaluate_now or save_now or done % recipe.train.log_every == 0):
                continue

            with _naming_last_checkpoint(checkpoints):
                rows, speed = meter.fetch()
            rows[-1] |= speed
            for number, row in enumerate(rows, start=done - len(rows) + 1):
                logger.log_step(number, number / steps_per_epoch, row)
            progress.update(done, epoch, rows[-1])
            for _, path, reason in ranks.gather(loader.replaced[reported:]):
                logger.log_replaced(done, path, reason)
                progress.print(f"warning: {path} {reason}; another image is shown in its place")
            reported = len(loader.replaced)

            accuracy = None
            if evaluate_now and len(manifest.ids("val")):
                model = engine.evaluation_model()
                scores = _validate(model, recipe, manifest, ranks, done)
                accuracy = scores.accuracy
                logger.log_eval(done, epoch, "val", {"loss": scores.loss, "accuracy": accuracy})
                progress.print(f"epoch {epoch:g}: validation accuracy {100 * accuracy:.1f} %, loss {scores.loss:.4f}")
            improved = accuracy is not None and (best is None or accuracy > best)
            if save_now or improved:
                ranks.on_first(checkpoints.wait)  # however slow the disk is: collectives have short patience
                state = engine.state(done)
                info = CheckpointInfo(done, recipe.model_dump(), manifest.hash, manifest.classes, accuracy)
                if ranks.first:
                    checkpoints.save(state, info, best=improved)
                best = accuracy if improved else best
            meter.restart_clock()
    engine.close()
    finish_run(run, checkpoints, ranks)


def _validate(model: Classifier, recipe: Recipe, manifest: Manifest, ranks: Ranks, step: int) -> Evaluation:
    loader = EvalLoader.from_manifest(
        manifest, "val", recipe.data, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device
    )
    return evaluate(
        model, loader, manifest.classes, num_images=len(manifest.ids("val")), split="val", step=step,
        precision=recipe.train.precision, group=ranks.group,
    )  # fmt: skip


def _require_even_parts(share: int, micro_batches: int) -> None:
    if share % micro_batches:
        fitting = [parts for parts in range(1, share + 1) if share % parts == 0]
        near = min(fitting, key=lambda parts: (abs(parts - micro_batches), parts))
        raise UserError(
            "train.micro_batches", micro_batches, f"does not divide the {share} images of a rank", f"try {near}"
        )


@contextlib.contextmanager
def _naming_last_checkpoint(checkpoints: CheckpointFolder) -> Iterator[None]:
    """Add to an error about the training itself which checkpoint is still good."""
    try:
        yield
    except UserError as error:
        checkpoints.wait()
        steps = checkpoints.steps()
        good = f"the last good checkpoint is {checkpoints.path(steps[-1])}" if steps else "there is no checkpoint yet"
        raise UserError(error.field, error.value, error.reason, f"{error.mend}; {good}") from None
