"""What a search leaves: the best recipe, the importance of each field, the report, a table."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import optuna
from rich.table import Table

from fpcn_dist.recipe.reading import dump_recipe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text
from fpcn_dist.runtime.terminal import Terminal
from fpcn_dist.studies.search.live import in_words, percent
from fpcn_dist.studies.search.plan import Plan
from fpcn_dist.studies.search.records import SearchResults, save_results
from fpcn_dist.studies.search.report import build_search_report

BEST, BEST_TEACHER = "best.yaml", "best-teacher.yaml"
_FEWEST = 4
"""Trials from which on importance means anything."""
_SHOWN = 10


def finish_search(plan: Plan, results: SearchResults) -> None:
    """Write best.yaml and report.html, complete results.json, print the best trials.

    Raises:
        UserError: no trial has finished.
    """
    results = dataclasses.replace(results, importance=importance(results))
    save_results(plan.output, results)
    console = Terminal()
    best = results.best
    if best is not None:
        recipe = next(iter(plan.runs(best.number, best.settings).values()))
        note = f"# Trial {best.number} of {results.stage} search {plan.output.name}: validation accuracy "
        note += f"{percent(best.accuracy)} with {plan.workers} rank(s).\n"
        if plan.population:
            note += "# Its settings changed on the way: these are the last ones; training with them alone differs.\n"
        write_text(plan.output / BEST, note + dump_recipe(recipe))
        if plan.stage == "joint":
            write_text(plan.output / BEST_TEACHER, note + dump_recipe(plan.teacher_recipe(best.settings)))
    report = build_search_report(plan.output, results, title=plan.output.name)
    console.print(_table(results))
    failed = [trial for trial in results.trials if trial.state == "failed"]
    for trial in failed:
        console.print(f"trial {trial.number} failed: {trial.reason}")
    if best is None:
        hint = f"see {plan.output / 'logs'}; the same command with --resume goes on"
        raise UserError("trials", None, "none has finished", hint)
    console.print(f"best recipe {plan.output / BEST}")
    console.print(f"report {report}")


def importance(results: SearchResults) -> dict[str, float]:
    """Share of each field in how well trials did, by Optuna's PED-ANOVA; {} where too few trials say anything."""
    trials = [trial for trial in results.trials if trial.accuracy is not None and trial.state != "failed"]
    if len(trials) < _FEWEST:
        return {}
    tried = {name: [t.settings[name] for t in trials if name in t.settings] for name in results.fields}
    distributions = {name: _distribution(values) for name, values in tried.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trial in trials:
            known = {name: value for name, value in trial.settings.items() if distributions[name] is not None}
            study.add_trial(
                optuna.trial.create_trial(
                    params=known, distributions={name: distributions[name] for name in known}, value=trial.accuracy
                )
            )
        try:
            return optuna.importance.get_param_importances(study)
        except (ValueError, RuntimeError):  # all trials did equally well
            return {}


def _distribution(values: list[Any]) -> Any:
    """Optuna's distribution of a field, made from the values that were tried; ``None`` where only one was tried."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        kinds = list(dict.fromkeys(values))
        return optuna.distributions.CategoricalDistribution(kinds) if len(kinds) > 1 else None
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    if low == high:
        return None
    if all(isinstance(value, int) for value in numbers):
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(low, high)


def _table(results: SearchResults) -> Table:
    """The best trials, or the Pareto front where there are two objectives."""
    latency = "latency" in results.objectives
    if latency:
        rows, title = results.pareto, "Pareto front: no other is both faster and more accurate"
    else:
        rows = sorted(results.finished, key=lambda trial: (-(trial.accuracy or 0.0), trial.number))[:_SHOWN]
        states = [trial.state for trial in results.trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("finished", "stopped", "failed"))
        title = f"{len(states)} trials: {counts}"
    table = Table("trial", "accuracy", *(["ms"] if latency else []), "settings", title=title, title_justify="left")
    for trial in rows:
        cells = [f"{trial.latency:.2f}"] if latency else []
        table.add_row(str(trial.number), percent(trial.accuracy), *cells, in_words(trial.settings))
    return table
