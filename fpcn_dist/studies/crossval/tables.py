"""Tables of a study: results.csv and comparisons.csv for machines, results.md for readers."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from fpcn_dist.runtime.files import make_folder, write_text
from fpcn_dist.runtime.names import markdown
from fpcn_dist.studies.crossval.figures import draw
from fpcn_dist.studies.crossval.results import Answer, Outcome, StudyResults
from fpcn_dist.studies.crossval.statistics import Scores

RESULTS, COMPARISONS, READABLE, FIGURES = "results.csv", "comparisons.csv", "results.md", "figures"
_HEADS = ("row", "accuracy %", "balanced %", "log loss", "ECE %", "against the reference, points", "p", "rate", "CPU s")


def save_results(output: Path, results: StudyResults) -> None:
    """Write the two CSV files, a figure for each question, and results.md, which shows them all."""
    write_text(output / RESULTS, _csv(_result_lines(results.outcomes)))
    write_text(output / COMPARISONS, _csv(_comparison_lines(results)))
    make_folder(output / FIGURES)
    parts = [_about(results)]
    for question, asked in results.answers:
        write_text(output / FIGURES / f"{question.key}.svg", draw(question, asked))
        parts.append(f"## {question.title}\n\n![{question.title}]({FIGURES}/{question.key}.svg)")
        parts += [f"{markdown(network)}:\n\n{table(answers)}" for network, answers in asked.items()]
    write_text(output / READABLE, "\n\n".join(parts) + "\n")


def table(answers: Sequence[Answer]) -> str:
    """The table of a question and a network in Markdown."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|---" + "|---:" * (len(_HEADS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(answer)) + " |" for answer in answers]
    names = dict.fromkeys(answer.reference for answer in answers if answer.reference)
    if names:
        lines += ["", f"Reference: {', '.join(map(markdown, names))}."]
    return "\n".join(lines)


def cells(answer: Answer) -> list[str]:
    """The cells of a row."""
    own, compared = answer.outcome, answer.difference
    beside = "-" if compared is None else f"{100 * compared.mean:+.1f} ({_interval(compared.low, compared.high)})"
    return [
        markdown(own.name),
        _spread(own, "accuracy", 100, 1),
        _spread(own, "balanced", 100, 1),
        _spread(own, "log_loss", 1, 3),
        _spread(own, "ece", 100, 1),
        beside,
        "-" if compared is None else f"{compared.p:.2g}",
        f"{own.rate:g}" if own.rate else "-",
        f"{own.seconds:.1f}",
    ]


def _interval(low: float, high: float) -> str:
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def _spread(outcome: Outcome, score: str, unit: float, digits: int) -> str:
    mean, spread = outcome.mean(score), outcome.spread(score)
    shown = f"{unit * mean:.{digits}f}"
    return shown if spread is None else f"{shown} ± {unit * spread:.{digits}f}"


def _about(results: StudyResults) -> str:
    return f"""# Results of the study

{results.tested:,} photographs in {results.folds} folds, each of which is tested once; {results.validation:,} others
chose the learning rates. Near-duplicates ({results.groups:,} groups among all) stay together. {results.steps} updates a
training.

Accuracies: mean and standard deviation over the seeds, each over all folds. Differences from the reference row are
paired by photograph, with 95 % bootstrap intervals over groups of near-duplicates; p is McNemar's exact test on the
mean of the seeds' probabilities. ECE: 15 bins. CPU s: of one training, without the features."""


def _result_lines(outcomes: Iterable[Outcome]) -> list[tuple[object, ...]]:
    heads = ("network", "row", "depth", "reading", "rate", "seed", *Scores._fields, "seconds", "departure")
    lines: list[tuple[object, ...]] = [heads]
    for own in outcomes:
        for seed, found in enumerate(own.scores):
            numbers = (f"{value:.6f}" for value in found)
            about = f"{own.seconds:.2f}", "" if own.departure is None else f"{own.departure:.6f}"
            lines.append(
                (own.network, own.row.name, own.row.depth, own.reading, f"{own.rate:g}", seed, *numbers, *about)
            )
    return lines


def _comparison_lines(results: StudyResults) -> list[tuple[object, ...]]:
    lines: list[tuple[object, ...]] = [("question", "network", "row", "reference", "difference", "low", "high", "p")]
    for question, asked in results.answers:
        for answer in itertools.chain.from_iterable(asked.values()):
            if answer.difference is not None:
                numbers = (f"{value:.6f}" for value in answer.difference[:3])
                about = question.key, answer.outcome.network, answer.outcome.name, answer.reference
                lines.append((*about, *numbers, f"{answer.difference.p:.3g}"))
    return lines


def _csv(lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
