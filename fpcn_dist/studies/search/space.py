"""What a search varies: recipe fields, drawn by Optuna, and the recipes that they make."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

from pydantic import BaseModel

from fpcn_dist.data.index.manifest import CHECK_FIELDS, SPLIT_FIELDS
from fpcn_dist.models.fpcn import region_name
from fpcn_dist.recipe.reading import recipe_from_dict
from fpcn_dist.recipe.schema import Dimension, ModelConfig, Recipe
from fpcn_dist.runtime.errors import UserError, nearest

Stage = Literal["teacher", "student", "joint"]
Settings = dict[str, Any]
"""Values of recipe fields, by their dotted names."""

PAIRS, NUM_PAIRS = "contrast.pairs", "contrast.num_pairs"
_BATCH = ("data.images_per_class", "data.classes_per_batch")
"""Fields that the size of a batch is made of."""
_MOST = 2**31
"""Whole numbers are searched below this one."""
DEFAULTS: dict[str, dict[str, Dimension]] = {
    "teacher": {
        "contrast.center_weight": Dimension(low=1e-4, high=10, log=True, also=[0.0]),
        PAIRS: Dimension(choices=["all", "random", "shifts", "hardest"]),
        NUM_PAIRS: Dimension(log=True),
    },
    "student": {
        "distill.temperature": Dimension(low=1, high=20),
        "distill.alpha": Dimension(low=0, high=1),
    },
}
"""What the two stages vary: lambda and the pairs of a batch; T and alpha."""

_FIXED = {
    "name": "it only names the run",
    "task": "the stage says what is trained",
    **dict.fromkeys(SPLIT_FIELDS, "it decides which images validate, so that accuracies would not compare"),
    **dict.fromkeys(CHECK_FIELDS, "the images are checked once for all trials"),
    "distill.teacher": "all trials have the same teacher",
    "distill.teacher_sha256": "all trials have the same teacher",
    "distill.bank": "it only says where the soft labels lie",
    "train.epochs": "trials are compared by epochs",
    "train.eval_every": "trials are compared by epochs",
    "search": "it describes the search itself",
}
_BANK = {
    *("data.resize", "data.crop", "data.fit", "data.flip", "data.views", "train.precision", "distill.teacher_mode"),
    *("data.mean", "data.std", "data.interpolation"),
}
"""Fields that soft labels depend on."""
_SOFT = ("distill.temperature", "distill.alpha", "distill.beta")
_MUTABLE = ("contrast.", *_SOFT, "optim.lr", "optim.weight_decay", "optim.momentum")
"""Fields that may change while a network is trained."""
_HEAD = (
    *("contrast.", *_SOFT, "optim.", "train.micro_batches", "data.images_per_class"),
    *("model.head", "model.hidden", "model.activation", "model.dropout", "model.fuse_init", "model.inference"),
)
"""Fields that the features of a frozen backbone do not depend on."""
_REGION = ("model.region", "model.companion", "model.theta", "model.area_scale")
"""Fields that say where they are pooled, which a bank of features holds several of."""
_BESIDE = 1 / 8
"""How likely a value beside a range is, before anything is known, as a share of how likely the range is."""


class Chooser(Protocol):
    """What is asked of an ``optuna.Trial``."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


class Space:
    """The fields of one recipe that a search varies, and how.

    Args:
        recipe: what every trial has in common; its ``search.space`` adds fields to those of the stage.
        stage: "teacher" or "student".
        classes: number of classes of the data, for the size of a batch that takes them all.

    Raises:
        UserError: a field that does not exist (with the nearest name) or cannot be searched, a range that does not fit
            its field, a value that the recipe refuses, or nothing to search.
    """

    def __init__(self, recipe: Recipe, stage: str, classes: int) -> None:
        self.common, self.classes = recipe, classes
        wanted: dict[str, Dimension | None] = dict(DEFAULTS[stage]) | recipe.search.space
        if recipe.model.head == "gated" and PAIRS not in recipe.search.space:
            wanted[PAIRS] = None  # it knows the hardest pairs alone
        found = {name: dimension for name, dimension in wanted.items() if dimension is not None}
        # The pairs of a batch depend on its size, and their number on their kind.
        order = sorted(found, key=lambda name: (not name.startswith("data."), name == NUM_PAIRS))
        self.dimensions = {name: _checked(name, found[name], stage) for name in order}
        if not self.dimensions:
            raise UserError("search.space", None, "leaves no field to search", "name one")
        for name, dimension in self.dimensions.items():
            if name != NUM_PAIRS:
                for value in _ends(name, dimension):
                    self._try(name, value)
        self._require_pairs()

    def _try(self, name: str, value: Any) -> None:
        """Refuse at once a value that the recipe refuses whatever the other fields are."""
        settings = {name: value}
        if name == PAIRS and value in ("random", "shifts"):
            settings[NUM_PAIRS] = self.common.contrast.num_pairs or 1
        try:
            self.recipe(settings)
        except UserError as error:
            raise UserError(f"search.space.{name}", repr(value), error.reason, error.hint) from None

    def _require_pairs(self) -> None:
        """Refuse numbers of pairs that some batch of the space does not have: its smallest and its largest one tell."""
        dimension, field = self.dimensions.get(NUM_PAIRS), f"search.space.{NUM_PAIRS}"
        searched = self.dimensions.get(PAIRS)
        kinds = [self.common.contrast.pairs] if searched is None else searched.choices or []
        if dimension is None:
            needy = sorted({"random", "shifts"} & set(kinds)) if self.common.contrast.num_pairs is None else []
            if needy:
                reason = f"is not searched, and the recipe has no number of pairs, which {' and '.join(needy)} need"
                raise UserError(field, None, reason, f"search it, set {NUM_PAIRS}, or take these out of {PAIRS}")
        if dimension is None or dimension.choices is not None or set(kinds) == {"all"}:
            return
        for settings in self._extreme_batches():
            images = self.batch_size(settings)
            low, high = self._bounds(NUM_PAIRS, dimension, settings)
            if low > high:
                batch = "".join(f", {name} {value}" for name, value in settings.items())
                reason = f"is empty for a batch of {images} images{batch}, which are {images} to {images**2} pairs"
                raise UserError(field, f"from {low:g} to {high:g}", reason, "widen the range, or that of the batch")

    def _extreme_batches(self) -> list[Settings]:
        """Settings of the smallest and of the largest batch that the space has."""
        sizes = {name: _ends(name, d) for name, d in self.dimensions.items() if name in _BATCH}
        drawn = [dict(zip(sizes, values, strict=True)) for values in itertools.product(*sizes.values())]
        ordered = sorted(drawn, key=self.batch_size)
        return [ordered[0], ordered[-1]]

    def suggest(self, trial: Chooser) -> Settings:
        """Draw a value for each field; the number of pairs only where their kind leaves a choice."""
        settings: Settings = {}
        for name, dimension in self.dimensions.items():
            if name == NUM_PAIRS:
                if self._pairs(settings) != "all":
                    settings[name] = self._num_pairs(settings, trial)
            else:
                settings[name] = _draw(name, dimension, trial)
        return settings

    def recipe(self, settings: Mapping[str, Any]) -> Recipe:
        """The whole recipe of a trial.

        Raises:
            UserError: these values do not go together.
        """
        values = self.common.model_dump() | {"search": {}}
        if settings.get(PAIRS) == "all":
            values["contrast"]["num_pairs"] = None
        for name, value in settings.items():
            section, _, field = name.rpartition(".")
            (values[section] if section else values)[field] = value
        return recipe_from_dict(values, "trial")

    def regions(self) -> list[ModelConfig] | None:
        """The regions that trials pool features in, where nothing else that is searched changes the features of a
        backbone that is frozen; ``None`` where something does.

        Raises:
            UserError: the fields of regions do not go together.
        """
        searched = {name: dimension for name, dimension in self.dimensions.items() if not name.startswith(_HEAD)}
        if any(name.startswith("optim.freeze") for name in self.dimensions):
            return None
        if any(name not in _REGION or dimension.choices is None for name, dimension in searched.items()):
            return None
        drawn = itertools.product(*(dimension.choices or [] for dimension in searched.values()))
        found = []
        for values in drawn:
            with contextlib.suppress(UserError):  # no trial has it either
                found.append(self.recipe(dict(zip(searched, values, strict=True))).model)
        return list({region_name(config): config for config in found}.values())

    def batch_size(self, settings: Mapping[str, Any]) -> int:
        """N, the images of a global batch."""
        data = {n.removeprefix("data."): v for n, v in settings.items() if n.startswith("data.")}
        return self.common.data.changed(**data).batch_size(self.classes)

    def count_pairs(self, settings: Mapping[str, Any]) -> int:
        """Pairs that a batch of a trial contrasts; the paper's "pairs per batch"."""
        images, kind = self.batch_size(settings), self._pairs(settings)
        if kind == "all":
            return images**2
        return settings.get(NUM_PAIRS, self.common.contrast.num_pairs) or 2 * images

    def perturb(self, settings: Settings, draw: random.Random) -> Settings:
        """Settings a step away, for population-based training: numbers times 0.8 or 1.25, choices drawn again one time
        in four."""
        changed = dict(settings)
        for name, dimension in self.dimensions.items():
            if dimension.choices is not None:
                if draw.random() < 0.25:
                    changed[name] = draw.choice(dimension.choices)
            elif name in changed and changed[name] not in dimension.also:
                low, high = self._bounds(name, dimension, changed)
                value = min(max(changed[name] * draw.choice([0.8, 1.25]), low), high)
                changed[name] = round(value) if is_whole(name) else value
        if self._pairs(changed) == "all":
            changed.pop(NUM_PAIRS, None)
        elif NUM_PAIRS in self.dimensions:
            low, high = self._bounds(NUM_PAIRS, self.dimensions[NUM_PAIRS], changed)
            changed[NUM_PAIRS] = self._fitting(changed.get(NUM_PAIRS, round(high)), changed)
        return changed

    def require_mutable(self) -> None:
        """Refuse fields that cannot change while a network is trained.

        Raises:
            UserError: there is one.
        """
        for name in self.dimensions:
            if not name.startswith(_MUTABLE):
                reason = "cannot change while a network is trained, as population-based training does"
                raise UserError(f"search.space.{name}", None, reason, "take it out, or use --scheduler asha")

    def _pairs(self, settings: Mapping[str, Any]) -> str:
        return settings.get(PAIRS, self.common.contrast.pairs)

    def _bounds(self, name: str, dimension: Dimension, settings: Settings) -> tuple[float, float]:
        low, high = _whole_ends(dimension) if is_whole(name) else (dimension.low, dimension.high)
        if name == NUM_PAIRS:
            images = self.batch_size(settings)
            low, high = images if low is None else low, images**2 if high is None else high
        assert low is not None and high is not None
        return low, high

    def _num_pairs(self, settings: Settings, trial: Chooser) -> int:
        dimension = self.dimensions[NUM_PAIRS]
        if dimension.choices is not None:
            return _draw(NUM_PAIRS, dimension, trial)
        low, high = self._bounds(NUM_PAIRS, dimension, settings)
        return self._fitting(trial.suggest_int(NUM_PAIRS, round(low), round(high), log=dimension.log), settings)

    def _fitting(self, count: int, settings: Settings) -> int:
        """The number nearest to ``count`` that there is: shifts come in multiples of N, the hardest pairs of 2 N."""
        images, kind = self.batch_size(settings), self._pairs(settings)
        if kind not in ("shifts", "hardest"):
            return count
        step, most = (images, images) if kind == "shifts" else (2 * images, images // 2)
        return step * min(max(1, round(count / step)), max(1, most))


def _checked(name: str, dimension: Dimension, stage: str) -> Dimension:
    """``dimension`` if it fits the field."""
    field = f"search.space.{name}"
    types = _types_of(name)
    for fixed, reason in _FIXED.items():
        if name == fixed or name.startswith(fixed + "."):
            raise UserError(field, None, f"cannot be searched: {reason}", "take it out")
    if stage == "student" and (name in _BANK or name.startswith("data.augment.")):
        reason = "cannot be searched: all trials learn from the same soft labels, which depend on it"
        raise UserError(field, None, reason, "take it out")
    if dimension.choices is not None:
        return dimension
    if not types & {int, float}:
        raise UserError(field, None, "is no number, so it has no range", "give choices")
    if name != NUM_PAIRS and (dimension.low is None or dimension.high is None):
        raise UserError(field, None, "has no range", "give low and high, or choices")
    if is_whole(name):
        low, high = _whole_ends(dimension)
        if low is not None and high is not None and low > high:
            shown = f"{dimension.low:g} to {dimension.high:g}"
            raise UserError(field, shown, "there is no whole number between them", "widen the range")
        if any(end is not None and abs(end) >= _MOST for end in (low, high)):
            raise UserError(field, None, f"its range reaches {_MOST} and beyond", "give a smaller one")
    return dimension


def _whole_ends(dimension: Dimension) -> tuple[int | None, int | None]:
    """The least and the largest whole number of a range, where it has that end."""
    low, high = dimension.low, dimension.high
    return None if low is None else math.ceil(low), None if high is None else math.floor(high)


def is_whole(name: str) -> bool:
    """Whether a field is an integer."""
    return float not in _types_of(name)


def _types_of(name: str) -> set[type]:
    """Types that a recipe field may have.

    Raises:
        UserError: there is no such field.
    """
    schema: Any = Recipe
    *sections, last = name.split(".")
    for part in (*sections, last):
        fields = schema.model_fields if isinstance(schema, type) and issubclass(schema, BaseModel) else {}
        if part not in fields:
            known = _all_fields(Recipe)
            raise UserError(f"search.space.{name}", None, "there is no such recipe field", nearest(name, known))
        schema = fields[part].annotation
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        hint = "name one of its fields: " + ", ".join(schema.model_fields)
        raise UserError(f"search.space.{name}", None, "is a section, not a field", hint)
    return set(_leaves(schema))


def _leaves(annotation: Any) -> Iterable[type]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _leaves(part)
    elif origin is Literal:
        yield from (type(value) for value in get_args(annotation))
    elif isinstance(annotation, type):
        yield annotation


def _all_fields(schema: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in schema.model_fields.items():
        annotation: Any = field.annotation
        nested = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        names += _all_fields(annotation, f"{prefix}{name}.") if nested else [prefix + name]
    return names


def _draw(name: str, dimension: Dimension, trial: Chooser) -> Any:
    if dimension.choices is not None:
        return trial.suggest_categorical(name, dimension.choices)
    assert dimension.low is not None and dimension.high is not None
    if dimension.also:
        return _draw_beside(name, dimension, trial)
    if is_whole(name):
        low, high = _whole_ends(dimension)
        assert low is not None and high is not None
        return trial.suggest_int(name, low, high, log=dimension.log)
    return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)


def _draw_beside(name: str, dimension: Dimension, trial: Chooser) -> float:
    """A number of the range, or one of those beside it, each of which takes up a piece of an axis: the range is 0 to 1
    on it, and the pieces lie below 0, so that 0 is a neighbour of the smallest weights."""
    low, high, also = dimension.low, dimension.high, dimension.also
    assert low is not None and high is not None
    position = trial.suggest_float(name, -_BESIDE * len(also), 1.0)
    if position < 0:
        value = also[min(int(-position / _BESIDE), len(also) - 1)]
    else:
        value = low * (high / low) ** position if dimension.log else low + position * (high - low)
    return round(value) if is_whole(name) else value


def _ends(name: str, dimension: Dimension) -> list[Any]:
    """The values that a recipe is tried with before the search begins."""
    if dimension.choices is not None:
        return dimension.choices
    ends = _whole_ends(dimension) if is_whole(name) else (dimension.low, dimension.high)
    beside = [int(value) for value in dimension.also] if is_whole(name) else dimension.also
    return [end for end in ends if end is not None] + beside
