"""Section ``search`` of a recipe: what a search varies."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from fpcn_dist.recipe.section import PositiveInt, Schema

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Dimension(Schema):
    """What a recipe field may be in a search: one of some choices, or a number of a range."""

    choices: list[Any] | None = None
    """Values to choose from."""
    low: Finite | None = None
    """Least value of a range."""
    high: Finite | None = None
    """Largest value of a range."""
    log: bool = False
    """Whether a range is searched by orders of magnitude."""
    also: list[Finite] = Field(default_factory=list)
    """Values tried beside a range, such as an exact 0 beside a logarithmic one."""

    @model_validator(mode="after")
    def _check(self) -> Dimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.also:
                raise ValueError("choices and a range exclude each other; give choices alone, or low and high")
            if len(self.choices) < 2:
                raise ValueError(f"choices {self.choices} leave nothing to search; give two or more")
        elif self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}; exchange them")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError(f"low {self.low} has no logarithm; raise it, and list 0 under also")
        return self


class SearchConfig(Schema):
    """What tune/search.py varies. Training itself does not look at it."""

    space: dict[str, Dimension | None] = Field(default_factory=dict)
    """Fields to search by their dotted names, beside those of the stage; null takes a field of the stage out."""
    trials_per_teacher: PositiveInt = 4
    """Stage joint: trials with other temperatures and alphas that each trained teacher is used for."""
