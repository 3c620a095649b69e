"""What a grid will take, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.studies.cluster import Slots

_START = 15.0
"""Seconds that a run spends on libraries, data and its report, whatever its length; measured on CPU cores."""
_FORWARD = 1 / 3
"""Share of a training step that a forward pass is."""


class Estimate(NamedTuple):
    """Seconds that runs take on one place.

    Attributes:
        seconds: the seconds of each run, or of all students of a teacher, by name.
        places: how many there are.
    """

    seconds: Mapping[str, float]
    places: int

    @property
    def total(self) -> float:
        """Seconds that all runs take on one place, one after the other."""
        return sum(self.seconds.values())

    @property
    def elapsed(self) -> float:
        """Seconds that all runs take on all places at once."""
        return self.total / self.places

    def show(self, slots: Slots, finished: int, console: Console) -> None:
        """Print the runs and the sum."""
        place = "GPU" if slots.kind == "GPU" else f"{slots.cpus} CPU core(s)"
        table = Table("run", f"on one place ({place})", title="To be trained", title_justify="left")
        table.columns[1].justify = "right"
        for name, seconds in self.seconds.items():
            table.add_row(name, in_words(seconds))
        console.print(table)
        count = len(self.seconds)
        console.print(
            f"{count} run(s), {finished} finished before; about {in_words(self.total)} on one place, "
            f"{in_words(self.elapsed)} on the {self.places} that there are",
            highlight=False,
        )


def run_seconds(step: float, recipe: Recipe, manifest: Manifest) -> float:
    """Seconds of a whole run on one place: its steps, its evaluations, and what surrounds them.

    Args:
        step: seconds of a training step.
        recipe: the recipe of the run.
        manifest: its images.
    """
    batch = recipe.data.batch_size(len(manifest.classes), len(manifest.ids("train")))
    steps = max(1, len(manifest.ids("train")) // batch) * recipe.train.epochs
    looks = recipe.train.epochs // recipe.train.eval_every * len(manifest.ids("val")) + len(manifest.ids("test"))
    return _START + step * (steps + _FORWARD * looks / batch)


def bank_seconds(step: float, student: Recipe, manifest: Manifest) -> float:
    """Seconds of all looks of a teacher whose training step takes ``step`` seconds."""
    batch = student.data.batch_size(len(manifest.classes), len(manifest.ids("train")))
    return step * _FORWARD * (student.data.views or 1) * len(manifest.ids("train")) / batch


def in_words(seconds: float) -> str:
    """A duration to about one part in twenty."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:.1f} days"
