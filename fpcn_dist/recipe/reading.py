"""Recipes from YAML and back, with errors that name a field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.errors import UserError, nearest


def _section(schema: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    for name in path:
        if str(name) not in schema.model_fields:
            continue  # a key of a mapping, whose values the field before has described
        annotation = schema.model_fields[str(name)].annotation
        nested = [schema for schema in _types(annotation) if issubclass(schema, BaseModel)]
        if not nested:
            break
        (schema,) = nested
    return schema


def _types(annotation: Any) -> list[type]:
    """The classes that an annotation is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [found for part in get_args(annotation) for found in _types(part)]


def explain(error: ValidationError, source: object) -> UserError:
    """The first of pydantic's complaints, as one sentence about one field."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _section(Recipe, first["loc"][:-1]).model_fields
        hint = nearest(str(first["loc"][-1]), known)
        return UserError(f"{source}: {field}", None, "there is no such recipe field", hint)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and ";" in reason:
        reason, hint = reason.split("; ", 1)
        return UserError(f"{source}: {field}", None, reason, hint)
    reason = reason[0].lower() + reason[1:]
    return UserError(f"{source}: {field}", repr(first["input"]), reason, "correct it")


def recipe_from_dict(values: Any, source: object) -> Recipe:
    """Validate nested ``values`` as a recipe; ``source`` names their origin in errors.

    Raises:
        UserError: an unknown field (with the nearest name), a wrong type, a value out of bounds.
    """
    if not isinstance(values, dict):
        raise UserError(str(source), None, "a recipe is a YAML mapping of fields to values", "see launch/recipes/")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise explain(error, source) from None


def load_recipe(path: Path, argument: str = "--recipe") -> Recipe:
    """Read a recipe file; ``argument`` names the one that gave it in errors.

    Raises:
        UserError: no such file, not YAML, or not a valid recipe.
    """
    try:
        return recipe_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), path)
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise UserError(argument, path, reason, "give a file of launch/recipes/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(argument, path, f"is not YAML ({' '.join(str(error).split())})", "correct the file") from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)
