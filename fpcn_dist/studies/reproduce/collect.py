"""From run folders to the paper's tables: accuracies of all seeds beside the paper's numbers."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fpcn_dist import __version__
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runs.evaluation import AREAS, Evaluation
from fpcn_dist.runs.metrics import read_metrics
from fpcn_dist.runs.model_folder import load_model
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.ranks import own_device
from fpcn_dist.studies.distill import BASELINE as STUDENT_BASELINE
from fpcn_dist.studies.distill.results import DISTILLATION_FILE
from fpcn_dist.studies.reproduce import paper
from fpcn_dist.studies.reproduce.experiments import BASELINE, WITHOUT_ALPHA, Grid, run_name
from fpcn_dist.studies.reproduce.gradcam import compare
from fpcn_dist.studies.reproduce.tables import Comparison, ReproductionResults, Row, RunRecord, Score, Table
from fpcn_dist.training.soft_labels.students import student_name

RUNS = "runs"
"""Folder of the run folders."""
_PICTURES = 6
"""Images of Figure 5."""
_ABLATIONS = {
    "mask": ("mask", "✓", None, None),
    "center": ("centre loss", None, "✓", None),
    "mask_alpha": ("mask, alpha", "✓", None, "✓"),
    WITHOUT_ALPHA: ("mask, centre loss", "✓", "✓", None),
    "fpcn": ("FPCN", "✓", "✓", "✓"),
}


def students_folder(output: Path, seed: int) -> Path:
    """Folder of the students of a seed."""
    return output / f"students-seed{seed}"


class _Outcome(NamedTuple):
    """What a run has come to."""

    record: RunRecord
    evaluation: Evaluation


def collect(
    grid: Grid, manifest: Manifest, output: Path, students: Sequence[str], failures: Mapping[str, str]
) -> ReproductionResults:
    """Everything that the runs below ``output`` have come to.

    Args:
        grid: the runs.
        manifest: the images.
        output: absolute folder of the reproduction.
        students: networks of Table 4.
        failures: why runs have no result, by their names.

    Raises:
        UserError: a result is damaged.
    """
    found = _Collector(grid, manifest, output, students, failures)
    make: dict[str, Callable[[], Table]] = {
        "table2": found.table_2,
        "table3": found.table_3,
        "table4": found.table_4,
        "figure3": found.figure_3,
        "figure4": found.figure_4,
    }
    tables = tuple(make[section]() for section in grid.sections if section in make)
    comparisons = found.figure_5() if "figure5" in grid.sections else ()
    split = "test" if len(manifest.ids("test")) else "val"
    return ReproductionResults(
        manifest.root, grid.scale, split, len(manifest.ids(split)), grid.seeds, tables, comparisons
    )


class _Collector:
    """Makes the paper's tables and figures from the run folders; each run is read once."""

    def __init__(
        self, grid: Grid, manifest: Manifest, output: Path, students: Sequence[str], failures: Mapping[str, str]
    ) -> None:
        self.grid, self.manifest, self.output, self.students = grid, manifest, output, students
        self.failures = failures
        self._known: dict[str, _Outcome | None] = {}

    def table_2(self) -> Table:
        rows = []
        for name, recipe in self.grid.of_section("table2").items():
            printed = paper.TABLE_2[name]
            outcomes, reason = self._outcomes(name)
            train = tuple(100 * _training_accuracy(self.output / o.record.folder) for o in outcomes)
            scores = Score(printed.train, train), Score(printed.test, _percents(outcomes))
            rows.append(Row(printed.title, (recipe.model.backbone,), scores, _records(outcomes), reason))
        note = (
            "Training accuracy: of the last epoch's training batches, cropped and flipped at random, while the network "
            "still learns. Test accuracy: of the epoch that was best on the validation images, each image once."
        )
        return self._table("table2", "Table 2: compared systems", "system", ("backbone",), rows, note, train=True)

    def table_3(self) -> Table:
        rows = [
            self._row(title, tuple(marks), paper.TABLE_3[name], name) for name, (title, *marks) in _ABLATIONS.items()
        ]
        note = "Alpha scales the masked features, so that there is no alpha without a mask."
        heads = ("area mask", "centre loss", "area scale (alpha)")
        return self._table("table3", "Table 3: what each part of FPCN adds", "setting", heads, rows, note)

    def figure_3(self) -> Table:
        rows = []
        for name, recipe in self.grid.of_section("figure3").items():
            title = paper.TABLE_2[name.partition("-")[0]].title
            rows.append(self._row(title, (float(self.grid.pairs(recipe)),), None, name))
        rows.sort(key=lambda row: (row.name, row.details[0]))
        note = (
            "The batches are the same; more of their pairs are learned from. FPCN: ordered pairs at random, at last "
            "all. API-Net: the nearest images of the same class and of others. PCA-Net: images of the same class."
        )
        return self._table("figure3", "Figure 3: accuracy against pairs", "system", ("pairs per batch",), rows, note)

    def figure_4(self) -> Table:
        rows = []
        for name, title in (("fpcn", "with alpha"), (WITHOUT_ALPHA, "without alpha")):
            outcomes, reason = self._outcomes(name)
            for number, area in enumerate(AREAS):
                parts = [outcome.evaluation.area_quartiles[number] for outcome in outcomes]
                score = Score(None, tuple(100 * part.accuracy for part in parts if part.accuracy is not None))
                images = statistics.fmean(part.images for part in parts) if parts else None
                rows.append(Row(title, (area, images), (score,), _records(outcomes), reason))
        note = "Area: the share of the feature map inside the region that each network finds; images: mean over seeds."
        heads = ("object area", "images")
        return self._table("figure4", "Figure 4: accuracy by object area", "setting", heads, rows, note)

    def table_4(self) -> Table:
        """The distilled students; the costs of a network are those of the first seed that has them."""
        distilled = {seed: _read(students_folder(self.output, seed) / DISTILLATION_FILE) for seed in self.grid.seeds}
        rows = [self._teacher_row(distilled)]
        for network in self.students:
            student, printed = student_name(network), paper.TABLE_4.get(network)
            entries = {seed: e for seed, values in distilled.items() for e in values if e.get("student") == student}
            scores, records = [], []
            for key, suffix in (("baseline", STUDENT_BASELINE), ("distilled", "")):
                ours = []
                for seed, entry in entries.items():
                    if entry[key] is not None:
                        ours.append(100 * entry[key]["accuracy"])
                        records.append(self._record(students_folder(self.output, seed) / (student + suffix), seed))
                scores.append(Score(printed and getattr(printed, key), tuple(ours)))
            reasons = [reason for entry in entries.values() for reason in entry["reasons"].values()]
            if len(entries) < len(self.grid.seeds):
                reasons += [reason for name, reason in self.failures.items() if name.startswith("students-seed")]
            details = _costs(next(iter(entries.values()), None), printed)
            title = printed.title if printed else student
            rows.append(Row(title, details, tuple(scores), tuple(records), "; ".join(dict.fromkeys(reasons))))
        heads = ("parameters, M", "paper's parameters, M", "GFLOPs", "paper's GFLOPs", "ms", "paper's ms")
        note = (
            "GFLOPs: two for each multiply-add, of one image; the paper counts multiply-adds, doubled here. "
            "Milliseconds: of one image on the device that each run names. Parameters: the paper puts a layer for 200 "
            "classes behind that of ImageNet."
        )
        scores = ("baseline, %", "distilled, %")
        return Table("table4", "Table 4: distilled students", "network", heads, scores, tuple(rows), note)

    def figure_5(self) -> tuple[Comparison, ...]:
        """Figure 5 for the first seed; empty where one of the two networks is missing."""
        seed, networks = self.grid.seeds[0], {}
        device = own_device()
        for title, name in (("plain classifier", BASELINE), ("FPCN", "fpcn")):
            outcome = self._outcome(name, seed)
            if outcome is None:
                return ()
            networks[title], info = load_model(self.output / outcome.record.folder, device)
        ids = self._pictures()
        images = [self.manifest.images[i] for i in ids.tolist()]
        labels = self.manifest.labels[ids]
        shown = info.preprocessing.preprocessing  # the two have one backbone
        config = self.grid.base.data.settled(shown).changed(eval_batch_size=len(ids))
        (batch,) = _load(self.manifest, ids, config, device)
        paths = [image.path for image in images]
        return compare(
            networks,
            batch.images,
            labels.tolist(),
            paths,
            self.manifest.classes,
            self.output / "figure5",
            self.output,
            config,
        )

    def _pictures(self) -> Any:
        """Ids of evaluation images, classes in turn."""
        split = "test" if len(self.manifest.ids("test")) else "val"
        ids = self.manifest.ids(split)
        of_class = [ids[self.manifest.labels[ids] == label] for label in range(len(self.manifest.classes))]
        turns = [own[turn] for turn in range(_PICTURES) for own in of_class if turn < len(own)]
        return np.array(turns[:_PICTURES])

    def _table(
        self,
        key: str,
        title: str,
        name: str,
        details: tuple[str, ...],
        rows: Sequence[Row],
        note: str,
        *,
        train: bool = False,
    ) -> Table:
        scores = ("training accuracy, %", "test accuracy, %") if train else ("test accuracy, %",)
        return Table(key, title, name, details, scores, tuple(rows), note)

    def _row(self, title: str, details: tuple[str | float | None, ...], printed: float | None, name: str) -> Row:
        outcomes, reason = self._outcomes(name)
        return Row(title, details, (Score(printed, _percents(outcomes)),), _records(outcomes), reason)

    def _teacher_row(self, distilled: Mapping[int, Sequence[dict[str, Any]]]) -> Row:
        outcomes, reason = self._outcomes("fpcn")
        cost = next((entry for values in distilled.values() for entry in values if "sha256" in entry), None)
        scores = Score(paper.TEACHER.baseline, _percents(outcomes)), Score(None, ())
        return Row(paper.TEACHER.title, _costs(cost, paper.TEACHER), scores, _records(outcomes), reason)

    def _outcomes(self, name: str) -> tuple[list[_Outcome], str]:
        """The outcomes of all seeds that have one, and why the other seeds have none."""
        outcomes, reasons = [], []
        for seed in self.grid.seeds:
            outcome = self._outcome(name, seed)
            if outcome is None:
                reasons.append(self.failures.get(run_name(name, seed), "it has not been trained"))
            else:
                outcomes.append(outcome)
        return outcomes, "; ".join(dict.fromkeys(reasons))

    def _outcome(self, name: str, seed: int) -> _Outcome | None:
        run = run_name(name, seed)
        if run not in self._known:
            folder = self.output / RUNS / run
            evaluation = None if run in self.failures else Evaluation.load(folder)
            self._known[run] = None if evaluation is None else _Outcome(self._record(folder, seed), evaluation)
        return self._known[run]

    def _record(self, folder: Path, seed: int) -> RunRecord:
        argv = ["launch/train.py", "--recipe", str(folder / "recipe.yaml"), "--data", self.manifest.root]
        command = f"python {shlex.join(argv)} --output NEW"
        environment = _environment(folder)
        full = environment.get("commit")
        commit = full[:12] + "+" * full.endswith("+") if full else f"fpcn_dist {__version__}"
        relative = folder.relative_to(self.output).as_posix()
        return RunRecord(relative, seed, command, commit, str(environment.get("device", "unknown")))


def _percents(outcomes: Sequence[_Outcome]) -> tuple[float, ...]:
    return tuple(100 * outcome.evaluation.accuracy for outcome in outcomes)


def _records(outcomes: Sequence[_Outcome]) -> tuple[RunRecord, ...]:
    return tuple(outcome.record for outcome in outcomes)


def _training_accuracy(run: Path) -> float:
    """The accuracy on training images, as a mean over the steps of the last epoch."""
    steps = [line for line in read_metrics(run) if line["kind"] == "step"]
    last = steps[-1]["epoch"] - 1
    return statistics.fmean(line["accuracy"] for line in steps if line["epoch"] > last + 1e-9)


def _environment(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "environment.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _read(path: Path) -> list[dict[str, Any]]:
    """The teacher and the students of a distillation; empty where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return [values["teacher"], *values["students"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("file", path, f"is damaged ({error})", "remove it, and give the same command again") from None


def _costs(entry: Mapping[str, Any] | None, printed: paper.Student | None) -> tuple[float | None, ...]:
    """Parameters in millions, GFLOPs and milliseconds, ours and the paper's."""
    ours: list[float | None] = [None, None, None]
    if entry is not None and entry.get("parameters") is not None:
        values = entry["parameters"] / 1e6, entry["flops"] / 1e9, entry["milliseconds"]
        ours = [float(f"{value:.3g}") for value in values]
    theirs: list[float | None] = [None, None, None]
    if printed is not None:
        theirs = [printed.parameters, 2 * printed.multiply_adds / 1000, printed.milliseconds]
    return tuple(value for pair in zip(ours, theirs, strict=True) for value in pair)


def _load(manifest: Manifest, ids: Any, config: DataConfig, device: Any) -> EvalLoader:
    blobs = [manifest.blob(i) for i in ids.tolist()]
    return EvalLoader(blobs, manifest.labels[ids], ids, config, rank=0, world_size=1, device=device)
