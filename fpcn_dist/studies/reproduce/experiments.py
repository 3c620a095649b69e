"""Which runs the paper's tables and figures need, as recipes: what they have in common, and what each changes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from fpcn_dist.recipe.reading import recipe_from_dict
from fpcn_dist.recipe.schema import ContrastConfig, ModelConfig, Recipe
from fpcn_dist.runtime.errors import UserError, nearest
from fpcn_dist.studies.reproduce.paper import TABLE_2

Scale = Literal["tiny", "paper"]
SECTIONS = ("table2", "table3", "table4", "figure3", "figure4", "figure5")
BASELINE = "baseline"
"""Name of the plain classifier on FPCN's backbone (Figure 5)."""
WITHOUT_ALPHA = "mask_center"
"""Name of the run that is FPCN but for alpha (Table 3, Figure 4)."""

_PAIRS = {"tiny": (2, 6), "paper": (2, 4, 8, 16)}
"""Pairs of Figure 3, in multiples of the images of a batch."""
_SMALLER = {"bilinear_cnn": "resnet18", "mmal_net": "resnet18"}
"""Backbones of scale "tiny" where the published ones would take most of its time."""
_RATES = {"pca_net": 0.1}
"""Learning rates as shares of FPCN's: the length of PCA-Net's vectors multiplies its gradients."""
_RATES_FROM_SCRATCH = {"alexnet": 0.1, "vgg16": 0.1}
"""Learning rates as shares of FPCN's, at scale "tiny", of deep networks without normalisation layers."""
_PLAIN, _PLAIN_CONTRAST = ModelConfig().model_dump(), ContrastConfig().model_dump()
"""What a compared system has where its recipe says nothing, whatever FPCN has."""
_VIEWS = {"tiny": 4, "paper": 16}
"""Views of an image that a teacher looks at."""


def parse_sections(only: str | None) -> tuple[str, ...]:
    """Sections of ``only``, separated by commas, in the paper's order; all of them for ``None``.

    Raises:
        UserError: there is no such section.
    """
    wanted = [name.strip() for name in only.split(",")] if only is not None else list(SECTIONS)
    for name in wanted:
        if name not in SECTIONS:
            raise UserError("--only", name, "is none of the paper's tables and figures", nearest(name, SECTIONS))
    return tuple(name for name in SECTIONS if name in wanted)


class Grid:
    """The runs of some sections.

    Args:
        base: recipe of FPCN; what it says about data, optimizer and training holds for every run.
        systems: folder of the recipes of the compared systems, which say what network and task each is.
        scale: "tiny" or "paper".
        sections: some of :data:`SECTIONS`.
        seeds: the seeds of the trainings.
        classes: the number of classes of the data.

    Attributes:
        runs: recipe of each run, by the name of its run folder; without those of Table 4.

    Raises:
        UserError: a recipe of the systems is missing or wrong, or ``base`` cannot serve.
    """

    def __init__(
        self, base: Recipe, systems: Path, scale: Scale, sections: Iterable[str], seeds: Iterable[int], classes: int
    ) -> None:
        _check(base)
        self.base, self._systems, self.scale = base, systems, scale
        self.sections, self.seeds = tuple(sections), tuple(seeds)
        self._images = base.data.batch_size(classes)
        recipes: dict[str, Recipe] = {}
        for section in self.sections:
            recipes |= self.of_section(section)
        self.runs = {run_name(n, seed): with_seed(r, seed) for seed in self.seeds for n, r in recipes.items()}

    def of_section(self, section: str) -> dict[str, Recipe]:
        """Recipe of each experiment of a section, by its name, with the base's seed."""
        fpcn = {"fpcn": self._changed("fpcn")}
        if section == "table2":
            return {name: self._system(name) for name in TABLE_2 if name != "fpcn"} | fpcn
        if section == "table3":
            return self._ablations() | fpcn
        if section == "figure3":
            return self._more_pairs() | fpcn
        if section == "figure4":
            return {WITHOUT_ALPHA: self._ablations()[WITHOUT_ALPHA]} | fpcn
        if section == "figure5":
            return {BASELINE: self._changed(BASELINE, task="classify")} | fpcn
        return fpcn

    def pairs(self, recipe: Recipe) -> int:
        """Pairs of a global batch that a run of Figure 3 learns from."""
        if recipe.contrast.num_pairs is not None:
            return recipe.contrast.num_pairs
        if recipe.task == "pca_net":
            return self._images
        return 2 * self._images if recipe.contrast.pairs == "hardest" else self._images**2

    def student(self, seed: int, teacher: Path) -> Recipe:
        """Recipe of the students of Table 4, taught by the model in a run folder."""
        base = self.base
        data = base.data.changed(views=base.data.views or _VIEWS[self.scale])
        student = self._changed(
            "student",
            task="distill",
            data=data.model_dump(),
            optim={"freeze": "none"},
            distill=base.distill.model_dump() | {"teacher": str(teacher)},
        )
        return with_seed(student, seed)

    def _changed(self, name: str, **sections: Any) -> Recipe:
        values: dict[str, Any] = self.base.model_dump() | {"name": name}
        # One checkpoint to go on from: a grid has many runs.
        values["train"]["keep_checkpoints"] = 1
        for section, change in sections.items():
            values[section] = values[section] | change if isinstance(change, dict) else change
        if self.base.data.split_seed is None:
            values["data"]["split_seed"] = self.base.seed
        return recipe_from_dict(values, name)

    def _system(self, name: str, **contrast: Any) -> Recipe:
        """A compared system: its own network, task and pairs; all else as FPCN."""
        own = _read(self._systems / f"{name}.yaml")
        optim: dict[str, Any] = {}
        if "freeze" not in own.get("optim", {}):
            optim["freeze"] = "none"
        share = _RATES | (_RATES_FROM_SCRATCH if self.scale == "tiny" else {})
        optim["lr"] = self.base.optim.lr * share.get(name, 1.0)
        model = own.get("model", {})
        if not self.base.model.pretrained:
            model["pretrained"] = False
        model["backbone"] = self._backbone(name, model["backbone"])
        return self._changed(
            name,
            task=own["task"],
            model={**_PLAIN, **model},
            optim=optim,
            contrast={**_PLAIN_CONTRAST, **own.get("contrast", {}), **contrast},
        )

    def _backbone(self, name: str, published: str) -> str:
        """The paper trains API-Net and PCA-Net with FPCN's backbone."""
        own = self.base.model.backbone
        if name == "api_net":
            return own
        if name == "pca_net":
            return own if own in ("resnet50", "resnet101") else "resnet50"
        return _SMALLER.get(name, published) if self.scale == "tiny" else published

    def _ablations(self) -> dict[str, Recipe]:
        """Table 3: mask, centre loss and alpha, one by one; alpha is part of the mask."""
        mask, no_mask = {"area_scale": False}, {"region": "none", "companion": False, "area_scale": False}
        no_center = {"center_weight": 0.0}
        return {
            "mask": self._changed("mask", model=mask, contrast=no_center),
            "center": self._changed("center", model=no_mask),
            "mask_alpha": self._changed("mask_alpha", contrast=no_center),
            WITHOUT_ALPHA: self._changed(WITHOUT_ALPHA, model=mask),
        }

    def _more_pairs(self) -> dict[str, Recipe]:
        """Figure 3: the same batches, from which more and more pairs are taken."""
        found = {"api_net": self._system("api_net"), "pca_net": self._system("pca_net")}
        images = self._images
        for multiple in _PAIRS[self.scale]:
            if multiple < images:
                pairs = {"pairs": "random", "num_pairs": multiple * images}
                found[f"fpcn-{multiple}n"] = self._changed(f"fpcn-{multiple}n", contrast=pairs)
            if multiple > 2 and multiple // 2 < images:
                name = f"api_net-{multiple}n"
                found[name] = self._system("api_net", num_pairs=multiple * images)
            if multiple < (self.base.data.images_per_class or 0):
                name = f"pca_net-{multiple}n"
                found[name] = self._system("pca_net", num_pairs=multiple * images)
        return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError("system", path, f"cannot be read ({error})", "restore launch/recipes/compared") from None


def _check(base: Recipe) -> None:
    """Refuse a recipe that leaves nothing to take away from or compare with."""
    if isinstance(base.model.pretrained, str):
        hint = "use true (ImageNet weights of each network) or false (from scratch)"
        raise UserError("model.pretrained", base.model.pretrained, "every system has other weights", hint)
    for field, value, wrong, hint in (
        ("task", base.task, base.task != "contrast", "set it to 'contrast'"),
        ("model.region", base.model.region, base.model.region == "none", "use threshold or largest"),
        ("model.area_scale", base.model.area_scale, not base.model.area_scale, "set it to true"),
        ("contrast.center_weight", base.contrast.center_weight, not base.contrast.center_weight, "use 0.5"),
        ("contrast.pairs", base.contrast.pairs, base.contrast.pairs != "all", "set it to 'all'"),
        ("engine.name", base.engine.name, base.engine.name != "ddp", "set it to 'ddp'"),
    ):
        if wrong:
            raise UserError(field, value, "is not FPCN as the paper trains it, which the tables start from", hint)


def run_name(name: str, seed: int) -> str:
    """The name of the run folder of an experiment with a seed."""
    return f"{name}-seed{seed}"


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """``recipe`` with another seed; the images of each split stay the same where ``data.split_seed`` is set."""
    return recipe.changed(seed=seed)
