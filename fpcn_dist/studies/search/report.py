"""The report of a search: one HTML file that shows what its trials used and how well they classify."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from fpcn_dist.runs.report.page import REPORT_FILE, write_page
from fpcn_dist.studies.search import figures
from fpcn_dist.studies.search.space import NUM_PAIRS

if TYPE_CHECKING:
    from fpcn_dist.studies.search.records import SearchResults, TrialRecord

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_STATES = {"finished": "finished", "running": "running", "stopped": "stopped early", "failed": "failed"}


def build_search_report(output: Path, results: SearchResults, *, title: str) -> Path:
    """Write ``output``/report.html, which needs no other file to be read but links those of the trials.

    Args:
        output: folder of the search, with the runs in trials/00000/ and so on.
        results: what is known by now; trials may still be running.
        title: heading of the page.

    Raises:
        UserError: it cannot be written.
    """
    best = results.best
    return write_page(
        output,
        _TEMPLATE,
        title=title,
        subtitle=f"search of {'teacher and student' if results.stage == 'joint' else 'a ' + results.stage}",
        tiles=_tiles(results),
        best=best,
        settings=[
            (figures.label_of(results, name), figures.write_value(value))
            for name, value in (best.settings.items() if best else ())
        ],
        joint=results.stage == "joint",
        recipe=shlex.quote(str(output / "best.yaml")),
        charts=_charts(results),
        progress=Markup(figures.draw_progress(results, "progress")),
        importance=Markup(figures.draw_importance(results, "importance")),
        pareto=Markup(figures.draw_pareto(results, "pareto")),
        front=[(trial, _cells(results, trial, ("accuracy", "latency", "epoch"))) for trial in results.pareto],
        columns=_columns(results),
        rows=[(trial, _cells(results, trial, _columns(results))) for trial in _sorted(results)],
        failed=[trial for trial in results.trials if trial.state == "failed"],
        links={trial.number: _links(output, trial.number) for trial in results.trials},
    )


def _tiles(results: SearchResults) -> list[dict[str, str]]:
    """The headline: name, value and a note of each number that there is."""
    best, tiles = results.best, []
    if best is not None:
        note = f"trial {best.number}, validation images"
        tiles.append({"name": "best accuracy", "value": f"{100 * (best.accuracy or 0):.1f} %", "note": note})
    if results.pareto:
        fastest = results.pareto[0]
        note = f"trial {fastest.number}, {100 * (fastest.accuracy or 0):.1f} %"
        tiles.append({"name": "fastest of the front", "value": f"{fastest.latency:.3g} ms", "note": note})
    states = [trial.state for trial in results.trials]
    note = ", ".join(f"{states.count(state)} {text}" for state, text in _STATES.items() if state in states)
    tiles.append({"name": "trials", "value": str(len(states)), "note": note})
    tiles.append({"name": "stage", "value": results.stage, "note": ""})
    tiles.append({"name": "epochs", "value": str(results.epochs), "note": "of a whole trial"})
    return tiles


class _Chart(NamedTuple):
    heading: str
    svg: Markup
    note: str


def _charts(results: SearchResults) -> list[_Chart]:
    """The plots of accuracy against all that was searched. The SVG comes from matplotlib, which escapes its labels."""
    pairs = figures.draw_pairs(results, "pairs")
    note = "The pairs of images that a batch of the teacher contrasts, as in Figure 3 of the paper."
    drawn = [("pairs per batch", pairs, note)]
    for place, name in enumerate(results.fields):
        if figures.bare(results, name) == NUM_PAIRS and pairs:
            continue  # the same numbers, without the batches that contrast all
        values = [trial.settings[name] for trial in results.trials if name in trial.settings]
        if all(map(figures.is_number, values)):
            svg = figures.draw_numbers(results, name, f"field{place}")
            apart = name in results.log_fields and any(value == 0 for value in values)
            note = "The axis is logarithmic, but for an exact 0, left of the dashed line." if apart else ""
        else:
            svg, note = figures.draw_choices(results, name, f"field{place}"), ""
        drawn.append((figures.label_of(results, name), svg, note))
    return [_Chart(heading, Markup(svg), note) for heading, svg, note in drawn if svg]


def _sorted(results: SearchResults) -> list[TrialRecord]:
    """The trials, the best first; those that had fewer epochs come after those that finished."""
    return sorted(
        results.trials,
        key=lambda trial: (
            trial.state != "finished",
            trial.state == "failed",
            -(trial.accuracy if trial.accuracy is not None else -1),
            trial.number,
        ),
    )


def _columns(results: SearchResults) -> tuple[str, ...]:
    """The headings of the table of all trials; the column of the trials' numbers, which is the first, has none here."""
    latency = ("latency",) if "latency" in results.objectives else ()
    pairs = ("pairs",) if any(trial.pairs is not None for trial in results.trials) else ()
    return ("state", "accuracy", "epoch", *pairs, *latency, *results.fields, "seconds")


def _cells(results: SearchResults, trial: TrialRecord, columns: tuple[str, ...]) -> list[str]:
    """The texts of a trial under these headings."""
    known: dict[str, Any] = {
        "state": _STATES.get(trial.state, trial.state),
        "accuracy": None if trial.accuracy is None else f"{100 * trial.accuracy:.1f}",
        "epoch": trial.epoch,
        "pairs": None if trial.pairs is None else f"{trial.pairs:,}",
        "latency": None if trial.latency is None else f"{trial.latency:.3g}",
        "seconds": f"{trial.seconds:,.0f}",
    }
    cells = []
    for column in columns:
        if column in known:
            cells.append("-" if known[column] is None else figures.write_value(known[column]))
        else:
            cells.append(figures.write_value(trial.settings[column]) if column in trial.settings else "-")
    return cells


def _links(output: Path, number: int) -> list[tuple[str, str]]:
    """Text and address of the reports of a trial: its own, and those of the runs inside it."""
    folder = Path("trials") / f"{number:05d}"
    inner = sorted(path.parent.name for path in (output / folder).glob(f"*/{REPORT_FILE}") if path.is_file())
    own = [("report", folder / REPORT_FILE)] if (output / folder / REPORT_FILE).is_file() else []
    return [(text, quote(str(path))) for text, path in [*own, *((name, folder / name / REPORT_FILE) for name in inner)]]
