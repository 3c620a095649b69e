"""A search from beginning to end: Ray Tune runs the trials; all that must outlive it lies in the output folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.notices import show_notices
from fpcn_dist.runtime.address import Address
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder, write_text
from fpcn_dist.runtime.lock import locked
from fpcn_dist.runtime.ranks import CPU
from fpcn_dist.studies.cluster import connect_ray, find_slots
from fpcn_dist.studies.cluster.bank_job import write_bank, write_features
from fpcn_dist.studies.search.finish import finish_search
from fpcn_dist.studies.search.plan import Plan
from fpcn_dist.studies.search.records import TrialRecord, load_results
from fpcn_dist.studies.search.request import SearchRequest, checked, feature_regions, make_plan, require_searchable
from fpcn_dist.studies.search.resources import Bundle, require_places, trial_bundles
from fpcn_dist.training.soft_labels.teacher import open_teacher

_SEARCH_FILE, _TUNE = "search.json", "tune"
_ATTEMPTS = 3
"""How often a trial may lose a process or a node before it is given up."""
_CUT = 3
"""ASHA lets one in so many of the trials that reach an evaluation go on."""


def search(
    request: SearchRequest, data: Address, output: Path, *, address: str | None = None, resume: bool = False
) -> None:
    """Run all trials; leave results, the best recipe and a report in ``output``.

    Args:
        request: what is asked for.
        data: the image folder.
        output: folder of the search, on storage that every node sees.
        address: the address of a Ray cluster; ``None`` starts one on this machine.
        resume: go on with the search in ``output``.

    Raises:
        UserError: the request, the data or the cluster do not fit; names what does not. Or no trial has finished.
    """
    request, output = checked(request), output.resolve()
    recipe = request.student or request.recipe
    manifest = build_manifest(data.resolve(), recipe.data, recipe.seed)
    show_notices(manifest.refused, manifest.notices)
    if not len(manifest.ids("val")):
        hint = "raise it, or give the data a folder val/"
        raise UserError(
            "data.val_fraction", recipe.data.val_fraction, "no images validate, so trials would not compare", hint
        )
    if request.stage == "student":
        print(open_teacher(recipe, manifest, CPU), flush=True)
    require_searchable(request, len(manifest.classes))
    with connect_ray(address) as ray, contextlib.ExitStack() as held:
        slots = find_slots(ray)
        bundles = trial_bundles(slots, recipe.data.threads, workers=request.workers, gpus=request.gpus)
        places = require_places([node["Resources"] for node in ray.nodes() if node["Alive"]], bundles)
        make_folder(output)
        held.enter_context(locked(output))
        (output / "logs").mkdir(exist_ok=True)
        _describe_folder(output, request, manifest, resume)
        plan = make_plan(request, output, len(manifest.classes), bundles)
        if request.stage == "student" and recipe.distill.teacher_mode == "bank":
            assert plan.student is not None
            write_bank(ray, slots, plan.student, manifest, output)
        if plan.features:
            regions = feature_regions(request, len(manifest.classes))
            assert regions is not None
            write_features(ray, slots, plan.main, manifest, output, regions)
        rank = ", ".join(f"{amount:g} {kind}" for kind, amount in bundles[0].items())
        print(f"{request.trials} trials, {places} at a time, each of {len(bundles)} rank(s) with {rank}", flush=True)
        began = time.monotonic()
        recorder = _run(request, plan, bundles, places)
        elapsed = time.monotonic() - began
    share = recorder.seconds / (elapsed * places)
    print(f"{recorder.seconds:.0f} s in trials of {elapsed:.0f} s x {places}: {100 * share:.0f} %", flush=True)
    finish_search(plan, recorder.results())


def _run(request: SearchRequest, plan: Plan, bundles: list[Bundle], places: int) -> Any:
    """Run all trials that have not ended yet; returns the recorder that has followed them.

    What earlier starts have reached is read from results.json. What Tune itself keeps, as pickles, is never read.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # of a handler that ends as if all had been done
    from ray import tune

    # What a user must know of it, the recorder says.
    log = logging.getLogger("ray.tune")
    log.handlers, log.propagate = [logging.FileHandler(plan.output / "logs" / "tune.log")], False

    from fpcn_dist.studies.search.recorder import Recorder
    from fpcn_dist.studies.search.trial import clear_checkpoints, run_trial

    def trainable(config: dict[str, Any]) -> None:
        run_trial(config, plan)

    results = load_results(plan.output)
    before = results.trials if results else ()
    recorder = Recorder(plan)
    shutil.rmtree(plan.output / _TUNE, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory(bundles)),
        param_space=_parameters(request, plan, before),
        tune_config=_tune_config(request, plan, places, before),
        run_config=tune.RunConfig(
            name=_TUNE,
            storage_path=str(plan.output),
            callbacks=[recorder],
            verbose=0,
            stop={"epoch": plan.epochs},
            failure_config=tune.FailureConfig(max_failures=_ATTEMPTS),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
        ),
    )
    try:
        if request.trials > sum(record.ended for record in before):
            tuner.fit()
        else:
            recorder.setup()
    finally:
        recorder.close()
    for record in recorder.results().trials:  # of members of a population, and of those that were given up
        clear_checkpoints(plan, record.number)
    return recorder


def _parameters(request: SearchRequest, plan: Plan, before: Sequence[TrialRecord]) -> dict[str, Any]:
    """The settings that Tune itself draws: those of the members of a population, which no search algorithm suggests.

    Members that have begun keep the settings that they had come to.
    """
    if not plan.population:
        return {}
    from ray import tune

    from fpcn_dist.studies.search.sampler import draw_at_random

    settings = draw_at_random(plan, request.trials, plan.main.seed)
    for record in before:
        settings[record.number] = record.settings
    return {"settings": tune.grid_search(settings)}


def _tune_config(request: SearchRequest, plan: Plan, places: int, before: Sequence[TrialRecord]) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

    from fpcn_dist.studies.search.sampler import build_sampler, perturbing

    grace = -(-plan.epochs // _CUT**2)
    grace = min(plan.epochs, grace + -grace % plan.main.train.eval_every)
    goal: dict[str, Any] = {"time_attr": "epoch", "metric": "accuracy", "mode": "max"}
    if request.scheduler == "pbt":
        scheduler = PopulationBasedTraining(
            **goal, perturbation_interval=grace, custom_explore_fn=perturbing(plan, plan.main.seed), log_config=False
        )
        return tune.TuneConfig(
            scheduler=scheduler, num_samples=1, reuse_actors=True, trial_dirname_creator=_name_of_folder
        )
    scheduler = FIFOScheduler()
    if request.scheduler == "asha":
        scheduler = ASHAScheduler(**goal, max_t=plan.epochs, grace_period=grace, reduction_factor=_CUT)
        _remind(scheduler, before)
    sampler = build_sampler(
        plan,
        trials=request.trials,
        seed=plan.main.seed,
        trials_per_teacher=request.recipe.search.trials_per_teacher,
        before=before,
    )
    return tune.TuneConfig(
        search_alg=sampler,
        scheduler=scheduler,
        num_samples=request.trials - sum(record.ended for record in before),
        max_concurrent_trials=places,
        reuse_actors=True,
        trial_dirname_creator=_name_of_folder,
    )


def _remind(scheduler: Any, before: Sequence[TrialRecord]) -> None:
    """Let a scheduler see the evaluations of trials of earlier starts, by which it judges those to come."""
    for record in before:
        if record.ended:
            trial: Any = types.SimpleNamespace(trial_id=f"earlier-{record.number}")
            scheduler.on_trial_add(None, trial)
            for epoch, accuracy in record.history:
                scheduler.on_trial_result(None, trial, {"epoch": epoch, "accuracy": accuracy})
            scheduler.on_trial_remove(None, trial)


def _name_of_folder(trial: Any) -> str:
    return trial.trial_id


def _describe_folder(output: Path, request: SearchRequest, manifest: Manifest, resume: bool) -> None:
    """Describe the search in a new folder; where a search is resumed, see that it is the one that the folder holds.

    Raises:
        UserError: it holds something else, or a search that was asked for otherwise.
    """
    path = output / _SEARCH_FILE
    now = json.loads(json.dumps(_describe(request, manifest)))
    try:
        before = _read(path) if path.is_file() else None
        strangers = [p.name for p in output.iterdir() if p.name not in ("logs", _SEARCH_FILE) and p.name[0] != "."]
    except OSError as error:
        raise UserError("--output", output, f"cannot be used ({error})", "choose another folder") from None
    if before is None:
        if resume or strangers:
            reason = "holds no search" if resume else f"holds other files ({', '.join(sorted(strangers)[:3])})"
            raise UserError("--output", output, reason, "drop --resume" if resume else "choose a new or empty folder")
    elif not resume:
        raise UserError("--output", output, "holds a search already", "add --resume, or choose another folder")
    else:
        free = () if request.scheduler == "pbt" else ("trials",)  # a population has its size from the start
        changed = sorted(name for name in now if now[name] != before.get(name) and name not in free)
        if changed:
            name = changed[0]
            reason = f"the search in {output} has another {name} ({_short(before.get(name))}, now {_short(now[name])})"
            raise UserError("--resume", None, reason, "give the same command as before, or another --output")
    write_text(path, json.dumps(now, indent=1) + "\n")
    manifest.save(output / "manifest.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError("--output", path, f"is damaged ({error})", "choose another folder") from None


def _describe(request: SearchRequest, manifest: Manifest) -> dict[str, Any]:
    """Everything that must be the same for a search to go on, by name."""
    values = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    for name in ("recipe", "student"):
        values[name] = values[name] and values[name].model_dump()
    return values | {"data": manifest.hash}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
