"""A trial: the one training loop with some settings, in processes that Ray Tune has placed."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.models import build_model
from fpcn_dist.models.cost import measure
from fpcn_dist.recipe.reading import load_recipe
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import (
    CheckpointFolder,
    CheckpointInfo,
    changed_fields,
    read_checkpoint,
    require_same_recipe,
    write_checkpoint,
)
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.runtime.errors import Outage, UserError
from fpcn_dist.runtime.files import link_or_copy
from fpcn_dist.runtime.ranks import own_device, use_threads
from fpcn_dist.studies.cluster.ranks import Rendezvous, describe_rank, join, write_output_to
from fpcn_dist.studies.search.plan import Plan, number_of, run_folders
from fpcn_dist.studies.search.space import Settings
from fpcn_dist.training.loop import train_together
from fpcn_dist.training.soft_labels.teacher import name_teacher

# Read by Tune in this process: how long it waits for an ended trial's thread before it uses the process again.
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")

_PATIENCE = 60.0
"""Seconds that a checkpoint may take to reach the disk, and that ranks may end one after the other."""


def run_trial(config: dict[str, Any], plan: Plan) -> None:
    """The first rank of a trial; Tune calls it, again and again where a process or a node is lost.

    Args:
        config: see :func:`number_of`, and ``settings``.
        plan: the plan of the search.
    """
    number, settings = number_of(config, tune.get_context().get_trial_id()), config["settings"]
    reporter = None
    write_output_to(str(plan.log(number, 0)))
    print(describe_rank(0, plan.workers, ray.get_runtime_context().get_node_id()), flush=True)
    print(f"trial {number}: {json.dumps(settings)}", flush=True)
    began = time.monotonic()
    try:
        recipes = plan.runs(number, settings)
        if not plan.population:  # there settings change on the way
            _clear_foreign(recipes)
        reporter = _Reporter(plan, recipes, began)
        if any(RunFolder(run).read_outcome()[0] != "finished" for run in recipes):
            if plan.population:
                _take_over(recipes)
            meeting = Rendezvous(ray.util.get_node_ip_address())
            with _peers(plan, number, settings, meeting.address):
                _train(plan, number, settings, rank=0, meeting=meeting, watch=reporter)
        reporter.report(float(plan.epochs))
        clear_checkpoints(plan, number)
    except SystemExit:  # Tune has ended it
        if not plan.population:  # there it may only be interrupted
            clear_checkpoints(plan, number)
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise  # a lost process, node or disk: Tune tries again
        print(f"error: {reason}", flush=True)
        clear_checkpoints(plan, number)
        _report_failure(reason, reporter, began)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def clear_checkpoints(plan: Plan, number: int) -> None:
    """Remove the checkpoints of a trial that has ended; its records and, if it has finished, its model are kept."""
    for run in run_folders(plan.folder(number)):
        shutil.rmtree(run / "checkpoints", ignore_errors=True)


def _clear_foreign(recipes: dict[Path, Recipe]) -> None:
    """Remove what a trial left that had this number before the search was killed, and that Tune does not remember."""
    for run, recipe in recipes.items():
        path = RunFolder(run).recipe
        try:
            if path.is_file():
                before = CheckpointInfo(0, load_recipe(path).model_dump(), "", ())
                require_same_recipe(name_teacher(recipe), before, path)
        except UserError:
            shutil.rmtree(run)


def _train(
    plan: Plan, number: int, settings: Settings, *, rank: int, meeting: Rendezvous | str, watch: Any = None
) -> None:
    """One rank of a trial, from its checkpoints on."""
    manifest = Manifest.load(plan.output / "manifest.json")
    with join(rank, plan.workers, meeting) as ranks:
        if plan.stage == "joint":
            teacher = plan.teacher_folder(settings)
            if ranks.on_first(lambda: RunFolder(teacher).read_outcome()[0]) != "finished":
                train_together({teacher: plan.teacher_recipe(settings)}, manifest, ranks)
        runs = plan.runs(number, settings)
        failures = train_together(runs, manifest, ranks, watch=watch, evaluate=not plan.features)
    for run, reason in failures.items():
        raise UserError("student", run.name, reason, "see its log")


class _Peer:
    """A rank but the first; an actor, so that it can be ended from outside."""

    def train(self, plan: Plan, number: int, settings: Settings, rank: int, address: str) -> None:
        write_output_to(str(plan.log(number, rank)))
        print(describe_rank(rank, plan.workers, ray.get_runtime_context().get_node_id()), flush=True)
        _train(plan, number, settings, rank=rank, meeting=address)


@contextlib.contextmanager
def _peers(plan: Plan, number: int, settings: Settings, address: str) -> Iterator[None]:
    """The other ranks, in this trial's placement group, for the length of the block; what fails in one raises here."""
    placement: Any = ray.util.get_current_placement_group()
    actors, tasks = [], []
    for rank in range(1, plan.workers):
        bundle = placement.bundle_specs[rank]
        actor: Any = ray.remote(_Peer).options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, rank),
        )
        actors.append(actor.remote())
        tasks.append(actors[-1].train.remote(plan, number, settings, rank, address))
    try:
        yield
        ray.get(tasks, timeout=_PATIENCE)
    except Exception as error:
        # What a peer died of says more than that it is gone.
        done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=5.0) if tasks else ([], [])
        for task in done:
            try:
                ray.get(task)
            except RayTaskError as failure:
                if _reason(failure.cause) is not None:
                    raise failure.cause from error
            except RayError:
                continue
        raise
    finally:
        for actor in actors:
            ray.kill(actor)


def _reason(error: BaseException) -> str | None:
    """Why another attempt would end like this one; ``None`` where it might not."""
    if isinstance(error, UserError):
        return None if isinstance(error, Outage) else str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return f"out of memory ({' '.join(str(error).split())[:200]})"
    return None


class _Reporter:
    """Tells Tune how a trial stands. Tune answers by ending it, where its scheduler wants that.

    Args:
        plan: the plan of the search.
        recipes: the recipes of the trial, by run folder.
        began: when the trial did.
    """

    def __init__(self, plan: Plan, recipes: dict[Path, Recipe], began: float) -> None:
        self._plan, self._runs, self._began = plan, list(recipes), began
        self._told: dict[Path, float] = {}
        self.latency = {}
        if plan.latency:
            self.latency = {"latency": sum(map(_latency, recipes.values())) / len(recipes)}

    def __call__(self, run: Path, epoch: float, accuracy: float) -> None:
        self._told[run] = epoch
        # The last epoch is told once the run is whole: a trial may be ended as soon as it has told.
        if epoch < self._plan.epochs and all(self._told.get(other) == epoch for other in self._runs):
            self.report(epoch)

    def report(self, epoch: float) -> None:
        """Report the accuracy so far, after ``epoch`` epochs."""
        lines = [[line for line in read_metrics(run) if line["kind"] == "eval"] for run in self._runs]
        # In population-based training the weights of earlier evaluations may be another trial's.
        recent = [own[-1:] if self._plan.population else own for own in lines]
        accuracy = sum(max(line["accuracy"] for line in own) for own in recent) / len(recent)
        values = {"accuracy": accuracy, "epoch": epoch, "seconds": time.monotonic() - self._began, **self.latency}
        if not self._plan.population:
            tune.report(values)
            return
        (run,) = self._runs
        checkpoints = CheckpointFolder(run / "checkpoints", keep=1)
        if not checkpoints.folder.is_dir():  # of a member that had ended when the search was interrupted
            tune.report(values)
            return
        with tempfile.TemporaryDirectory(dir=run) as folder:
            path = _when_written(checkpoints.path(lines[0][-1]["step"]))
            link_or_copy(path, Path(folder) / path.name)
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))


def _latency(recipe: Recipe) -> float:
    """The milliseconds that one image takes; training does not change them."""
    device = own_device()
    use_threads(recipe.data.threads, device)
    config = recipe.model.changed(pretrained=False)
    return measure(build_model(config, 2, task=recipe.task), recipe.data.crop, device).milliseconds


def _when_written(path: Path) -> Path:
    deadline = time.monotonic() + _PATIENCE
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path


def _report_failure(reason: str, reporter: _Reporter | None, began: float) -> None:
    """Report the worst values there are, so that the search turns elsewhere; the trial is not tried again."""
    latency = reporter.latency if reporter else {}
    worst = {"accuracy": 0.0, "epoch": 0.0, "latency": math.inf, "seconds": time.monotonic() - began}
    tune.report(worst | latency | {"failure": reason})


def _take_over(recipes: dict[Path, Recipe]) -> None:
    """Begin with the weights that population-based training gives this trial, its own or another one's.

    Where the search goes on after an interruption, these are its own newest ones.
    """
    checkpoint = tune.get_checkpoint()
    ((run, recipe),) = recipes.items()
    own = CheckpointFolder(run / "checkpoints", keep=1)
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            (file,) = Path(folder).glob("step-*.safetensors")
            state, info = read_checkpoint(file)
    else:
        newest = own.newest()
        if newest is None or not changed_fields(recipe, newest.info):
            return
        _, state, info = newest
    own.clear()
    own.folder.mkdir(parents=True, exist_ok=True)
    settled = recipe.with_preprocessing(info.preprocessing)
    write_checkpoint(own.path(info.step), state, replace(info, recipe=settled.model_dump(), accuracy=None, best=None))
