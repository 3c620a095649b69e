"""One network in training: its engine, and all that its run folder keeps of it. The loop drives one or many."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import EvalLoader, Replacement
from fpcn_dist.models.cost import peak_flops
from fpcn_dist.recipe.training import Depth
from fpcn_dist.runs.checkpoint import CheckpointFolder, CheckpointInfo, TrainingState
from fpcn_dist.runs.evaluation import Evaluation, Evaluator
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.metrics import MetricsLogger
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.keys import key, seed_device
from fpcn_dist.runtime.products import default_matmul, multiplying
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.tasks import build_task
from fpcn_dist.training.engine import build_engine, forward_backward
from fpcn_dist.training.engine.optim import learning_rate
from fpcn_dist.training.feature_bank.attach import attach_features
from fpcn_dist.training.memory import describe_memory, free_bytes
from fpcn_dist.training.meter import StepMeter, forward_flops
from fpcn_dist.training.schedule import Schedule
from fpcn_dist.training.start import Start


class TrainingRun:
    """A recipe on its way to a model, from the newest checkpoint in its folder on. Nothing is written before
    :meth:`begin`.

    Args:
        run: its folder.
        start: what it computes, and where it begins or goes on.
        manifest: the images.
        ranks: this process among all.
        schedule: steps of the run.

    Attributes:
        first_step: the first step that it takes part in.
        replaced: files that turned unreadable, for the next log point to record.
        features: those of its images, while the backbone is frozen and they are computed once.
        failure: why it stopped before its last step, if it did.
    """

    def __init__(self, run: RunFolder, start: Start, manifest: Manifest, ranks: Ranks, schedule: Schedule) -> None:
        recipe = start.recipe
        self.run, self.recipe, self.manifest, self.ranks, self.schedule = run, recipe, manifest, ranks, schedule
        self.checkpoints = CheckpointFolder(run.checkpoints, keep=recipe.train.keep_checkpoints)
        self.first_step, self.best = start.step, start.best
        self.failure: str | None = None
        self.replaced: list[Replacement] = []
        self._build(start.state, recipe.optim.freeze if start.step < schedule.thaw else "none")

    def begin(self) -> None:
        """Write to the folder from now on; first the features that are computed once. Collective."""
        recipe, ranks, step = self.recipe, self.ranks, self.first_step
        task, manifest = self.engine.task, self.manifest
        self.features = attach_features(recipe, task, manifest, ranks, self.schedule, self.run.path, step=step)
        if self.features is None or self.schedule.thaw < self.schedule.total:
            self._warn_of_memory()
        self.meter = StepMeter(ranks, self.schedule.batch_size, None if self.features else self._flops_share())
        self.logger = MetricsLogger(self.run.path, ranks.rank, start_step=step)

    @property
    def images_from(self) -> int:
        """The first step that needs the images themselves."""
        return self.first_step if self.features is None else self.schedule.frozen

    def _flops_share(self) -> float | None:
        """Share of the ranks' peak that one image per second uses; ``None`` where the device's peak is unknown."""
        peak = peak_flops(self.ranks.device, self.recipe.train.precision)
        if peak is None:
            return None
        # The last step, because a task may do less at first.
        flops = 3 * forward_flops(self.engine.task, self.recipe.data.crop, self.schedule.total)
        return flops / peak / self.ranks.world_size

    def _warn_of_memory(self) -> None:
        config, ranks = self.recipe, self.ranks
        line = describe_memory(
            self.engine.task, config, len(self.manifest.classes), ranks.world_size, free_bytes(ranks.device)
        )
        if line is not None and ranks.first:
            print(line, flush=True)

    def _build(self, state: TrainingState | None, freeze: Depth = "none") -> None:
        # A state replaces pretrained weights, which may not even be reachable any more.
        recipe = self.recipe if state is None else self.recipe.changed(**{"model.pretrained": False})
        counts = self.manifest.class_counts("train")
        task = build_task(
            recipe,
            len(counts),
            self.ranks.group,
            steps_per_epoch=self.schedule.per_epoch,
            class_counts=counts,
            images=len(self.manifest.images),
        )
        self.engine = build_engine(self.recipe, task, self.ranks, freeze=freeze, state=state)

    def train(self, batch: Batch, step: int, waited: float) -> None:
        """The update that ``step`` makes; ``waited`` are the seconds that its batch was waited for."""
        config = self.recipe.train
        with multiplying(config.matmul or default_matmul(config.precision, self.ranks.device)):
            self._train(batch, step, waited)

    def _train(self, batch: Batch, step: int, waited: float) -> None:
        if step == self.schedule.thaw and step > self.first_step:
            # What was frozen thaws: a new engine takes the state over.
            state = self.engine.state(step)
            self.engine.close()
            self._build(state)
            if self.features is not None:
                self.features, self.meter.flops_share = None, self._flops_share()
        if self.features is not None:
            batch = dataclasses.replace(batch, pooled=self.features.added_to(batch))
        recipe = self.recipe
        seed_device(key(recipe.seed, step, self.ranks.rank), self.ranks.device)
        lr = learning_rate(recipe.optim, step, self.schedule.per_epoch, self.schedule.total)
        result = forward_backward(self.engine, batch, step, recipe.train.micro_batches)
        norm = self.engine.update(lr)
        self.meter.add(step + 1, batch, result, norm, lr, waited)

    def log(self, done: int) -> dict[str, float]:
        """Record the steps since the last log point, and return the numbers of the last one. Collective.

        Raises:
            NotFinite: a loss is not finite; names the last good checkpoint.
        """
        with self._naming_last_checkpoint():
            rows, speed = self.meter.fetch()
        rows[-1] |= speed
        for number, row in enumerate(rows, start=done - len(rows) + 1):
            self.logger.log_step(number, self.epoch(number), row)
        for _, path, reason in self.replaced:
            self.logger.log_replaced(done, path, reason)
        self.replaced.clear()
        return rows[-1]

    def epoch(self, done: int) -> float:
        """Epochs that ``done`` steps make."""
        return done / self.schedule.per_epoch

    def validation_images(self) -> EvalLoader:
        """This rank's share of the validation images; the same for all trainings that share batches."""
        ranks, config = self.ranks, self.recipe.data
        place = {"rank": ranks.rank, "world_size": ranks.world_size, "device": ranks.device}
        return EvalLoader.from_manifest(self.manifest, "val", config, **place)

    def begin_validation(self) -> Evaluator:
        """What counts the scores of the weights as they are now. Collective."""
        model, precision = self.engine.evaluation_model(), self.recipe.train.precision
        return Evaluator(model, self.manifest.classes, precision=precision)

    def end_validation(self, evaluator: Evaluator, done: int) -> Evaluation:
        """Scores over all ranks once each has shown its images to ``evaluator``; they are recorded. Collective."""
        images = len(self.manifest.ids("val"))
        scores = evaluator.result(num_images=images, split="val", step=done, group=self.ranks.group)
        values = {"loss": scores.loss, "accuracy": scores.accuracy}
        self.logger.log_eval(done, self.epoch(done), "val", values)
        return scores

    def save(self, done: int, accuracy: float | None, *, at_save_point: bool) -> None:
        """Write a checkpoint if it is time, or if ``accuracy`` is the best so far. Collective."""
        best = self.best
        if accuracy is not None and (best is None or accuracy > best[1]):
            best = done, accuracy
        improved = best != self.best
        if at_save_point or improved:
            began = time.perf_counter()
            # However slow the disk is: collectives have short patience.
            self.ranks.on_first(self.checkpoints.wait)
            state = self.engine.state(done)
            manifest = self.manifest
            info = CheckpointInfo(done, self.recipe.model_dump(), manifest.hash, manifest.classes, accuracy, best)
            if self.ranks.first:
                self.checkpoints.save(state, info, best=improved)
            self.logger.log_checkpoint(done, time.perf_counter() - began)
            self.best = best

    def stop(self, state: str, failure: str) -> None:
        """Take no further part: free the engine's memory, and leave the outcome in the folder.

        Args:
            state: "diverged" or "failed".
            failure: why.
        """
        self.failure = failure
        self.close()
        if self.ranks.first:
            self.run.set_outcome(state, failure)
        del self.engine

    def close(self) -> None:
        """Close the engine, so that it can be freed, and finish writing."""
        self.engine.close()
        self.finish_writing()

    def finish_writing(self) -> None:
        """Close the metrics, and wait until the last checkpoint is on the disk; does no harm twice."""
        self.logger.close()
        self.checkpoints.wait()

    @contextlib.contextmanager
    def _naming_last_checkpoint(self) -> Iterator[None]:
        """Add to an error about the training itself which checkpoint is still good."""
        try:
            yield
        except UserError as error:
            self.checkpoints.wait()
            steps = self.checkpoints.steps()
            path = self.checkpoints.path(steps[-1]) if steps else None
            good = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
            raise type(error)(error.field, error.value, error.reason, f"{error.hint}; {good}") from None
