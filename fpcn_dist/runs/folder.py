"""The run folder: what a run leaves behind, and whether a folder may be continued."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.recipe.reading import dump_recipe, load_recipe
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.environment import describe_environment
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder, write_text
from fpcn_dist.runtime.lock import locked
from fpcn_dist.runtime.names import is_utf8
from fpcn_dist.runtime.ranks import Ranks


class RunFolder:
    """Names of what is in a run folder. Every rank reads it, the first one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.manifest = path / "manifest.json"
        self.environment = path / "environment.json"
        self.checkpoints = path / "checkpoints"
        self.outcome = path / "outcome.json"

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made, its path is not UTF-8, or it holds files but no run.
        """
        if not is_utf8(self.path.absolute()):
            reason = "the path is not UTF-8, and what reads the weights of a run takes no other"
            raise UserError("--output", self.path, reason, "choose another folder")
        make_folder(self.path)
        found = [] if self.recipe.exists() else self.path.iterdir()
        strangers = [p.name for p in found if p.name[0] != "." and p.name != "logs"]  # that is a launcher's
        if strangers:
            reason = f"the folder holds other files ({', '.join(sorted(strangers)[:3])}) and no run"
            raise UserError("--output", self.path, reason, "choose a new or empty folder")

    def describe(self, recipe: Recipe, manifest: Manifest, ranks: Ranks, *, first_world_size: int) -> None:
        """Write recipe, manifest and environment."""
        write_text(self.recipe, dump_recipe(recipe))
        manifest.save(self.manifest)
        environment = describe_environment(ranks) | {"first_world_size": first_world_size}
        write_text(self.environment, json.dumps(environment, indent=2) + "\n")

    def first_world_size(self) -> int | None:
        """Ranks that the run was started with; ``None`` where that is not known."""
        try:
            return json.loads(self.environment.read_text(encoding="utf-8"))["first_world_size"]
        except (OSError, ValueError, KeyError):
            return None

    def set_outcome(self, state: str, reason: str | None = None) -> None:
        """Note how the run ended: "finished"; or, for ``reason``, "diverged" (its loss) or "failed" (anything else)."""
        write_text(self.outcome, json.dumps({"state": state, "reason": reason}, indent=2) + "\n")

    def read_outcome(self) -> tuple[str, str | None]:
        """What :meth:`set_outcome` noted; ("unfinished", None) where it has not ended."""
        try:
            values = json.loads(self.outcome.read_text(encoding="utf-8"))
            return values["state"], values["reason"]
        except FileNotFoundError:
            return "unfinished", None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("file", self.outcome, f"is damaged ({error})", "remove it") from None

    def open(self) -> tuple[Recipe, Manifest]:
        """Recipe and manifest of an existing run.

        Raises:
            UserError: there is no run in this folder.
        """
        if not self.recipe.is_file() or not self.manifest.is_file():
            raise UserError("RUN", self.path, "holds no run (recipe.yaml, manifest.json)", "give a folder of train.py")
        return load_recipe(self.recipe), Manifest.load(self.manifest)


@contextlib.contextmanager
def owning(output: Path, ranks: Ranks) -> Iterator[None]:
    """Make the run folder, and be the only run that writes to it for the length of the block. Collective.

    Raises:
        UserError: it cannot be made, holds something else, or another run that is alive is writing to it.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            RunFolder(output).create()
            held.enter_context(locked(output))

        ranks.on_first(take)
        yield
