"""What all sections of a recipe are. Imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")  # its errors are shown to users, who need no link

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

S = TypeVar("S", bound="Schema")


class Schema(BaseModel):
    """Base of all sections: immutable, and a field that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def changed(self: S, **values: Any) -> S:
        """The same with other values, which are validated as if they had been written in a recipe.

        Args:
            **values: by the name of a field, dotted where it lies in a section (``**{"optim.lr": 0.02}``).

        Raises:
            pydantic.ValidationError: there is no such field, or what comes out is not valid.
        """
        content = self.model_dump()
        for name, value in values.items():
            *sections, field = name.split(".")
            inner = content
            for section in sections:
                inner = inner[section]
            inner[field] = value
        return type(self).model_validate(content)


def truth(value: Any) -> Any:
    """``value`` of a field that takes a truth or a path: on a command line every word is a string, and "false" hardly a
    file's name."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted name, as recipes call their fields."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
