"""The run folder: what a run leaves behind, and whether a folder may be continued.

Recipe, manifest and checkpoints of a start belong together, and so does all that is made of them: when a run begins
anew, what was there before goes to ``previous/`` as a whole, before anything new is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.recipe.reading import dump_recipe, load_recipe
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runs.checkpoint import CheckpointFolder, CheckpointInfo, recipe_hash
from fpcn_dist.runs.environment import describe_environment
from fpcn_dist.runs.metrics import METRICS_FILE
from fpcn_dist.runs.probe import PROBE_FILE
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import link_or_copy, make_folder, write_text
from fpcn_dist.runtime.lock import locked
from fpcn_dist.runtime.names import is_utf8
from fpcn_dist.runtime.ranks import Ranks

LOG_FILE = "log.txt"
_PREVIOUS = "previous"
_SHARED = {LOG_FILE, "logs", "bank", PROBE_FILE, _PREVIOUS}
"""What stays when a run begins anew: logs, a launcher's too; a probe and soft labels, which know of what they are."""
_SIGHT = 15.0
"""Seconds that a file of the first rank may take to be seen by the others: network file systems remember what they
have not found."""


class RunFolder:
    """Names of what is in a run folder. Every rank reads it, the first one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.manifest = path / "manifest.json"
        self.environment = path / "environment.json"
        self.checkpoints = path / "checkpoints"
        self.outcome = path / "outcome.json"
        self.start = path / "start.json"

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
        strangers = [p.name for p in found if p.name[0] != "." and p.name not in _SHARED]
        if strangers:
            reason = f"the folder holds other files ({', '.join(sorted(strangers)[:3])}) and no run"
            raise UserError("--output", self.path, reason, "choose a new or empty folder")

    def describe(
        self, recipe: Recipe, manifest: Manifest, ranks: Ranks, *, first_world_size: int, start: dict[str, Any]
    ) -> None:
        """Write recipe, manifest, environment and ``start``, what :meth:`read_start` gives."""
        write_text(self.start, json.dumps(start, indent=2) + "\n")
        write_text(self.recipe, dump_recipe(recipe))
        manifest.save(self.manifest)
        environment = describe_environment(ranks) | {"first_world_size": first_world_size}
        write_text(self.environment, json.dumps(environment, indent=2) + "\n")

    def read_start(self) -> dict[str, Any]:
        """How the run began: the ``resume`` that it was asked for, by whom; empty where that is not known."""
        try:
            return dict(json.loads(self.start.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def described(self) -> CheckpointInfo:
        """Recipe and images of an existing run, as a checkpoint of it would say.

        Raises:
            UserError: there is no run in this folder.
        """
        recipe, manifest = self.open()
        return CheckpointInfo(0, recipe.model_dump(), manifest.hash, manifest.classes)

    def origin(self) -> dict[str, str] | None:
        """Hashes of recipe and manifest, which a model keeps; ``None`` where the folder has not both."""
        try:
            recipe = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
            manifest = hashlib.sha256(self.manifest.read_bytes()).hexdigest()
            return {"recipe": recipe_hash(recipe), "manifest": manifest}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise UserError("RUN", self.path, f"its recipe.yaml is damaged ({error})", "restore it") from None

    def set_aside(self, *, keep: Collection[str] = ()) -> None:
        """Move what is there to previous/, all of it or nothing, but for ``keep`` and what runs share.

        A start that left neither a model nor a checkpoint is not worth that: it stays, and is written over. What is in
        previous/ already makes room, unless it is a finished run and this one is not.

        Raises:
            OSError: it cannot be moved.
        """
        # The first is there where a process has died while it moved.
        moving, previous = self.path / f".{_PREVIOUS}", self.path / _PREVIOUS
        worth = self._is_finished() or CheckpointFolder(self.checkpoints, keep=1).steps()
        if not worth and not (self.path / "model.safetensors").exists() and not moving.exists():
            return
        moving.mkdir(exist_ok=True)
        staying = {*_SHARED, *keep}
        # The recipe last: a folder without it would be taken for somebody else's.
        for path in sorted(self.path.iterdir(), key=lambda path: path == self.recipe):
            if path.name[0] != "." and path.name not in staying:
                path.rename(moving / path.name)
        if (self.path / PROBE_FILE).exists() and not (moving / PROBE_FILE).exists() and PROBE_FILE not in keep:
            link_or_copy(self.path / PROBE_FILE, moving / PROBE_FILE)
        if RunFolder(previous)._is_finished() and not RunFolder(moving)._is_finished():
            shutil.rmtree(moving)
            return
        shutil.rmtree(previous, ignore_errors=True)
        moving.rename(previous)

    def _is_finished(self) -> bool:
        try:
            return self.read_outcome()[0] == "finished"
        except UserError:
            return False

    def set_results_aside(self) -> None:
        """Move what was made of the checkpoints to previous/; the run itself goes on."""
        own = (self.recipe, self.manifest, self.environment, self.start, self.checkpoints)
        others = (METRICS_FILE, PROBE_FILE, "tensorboard", "profile", "features")
        self.set_aside(keep=[*(path.name for path in own), *others])

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

    A folder that was made for it, and in which nothing was written, is removed again.

    Raises:
        UserError: it cannot be made, holds something else, or another run that is alive is writing to it.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            if not output.exists():
                held.callback(_remove_empty, output)
            RunFolder(output).create()
            held.enter_context(locked(output))

        ranks.on_first(take)
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def open_together(run: RunFolder, ranks: Ranks) -> None:
    """Make the folder of a run, and see that all ranks see the same one. Collective.

    Raises:
        UserError: see :meth:`RunFolder.create`; or it is not on storage that all ranks share.
    """
    sign = run.path / f".seen-{ranks.on_first(lambda: secrets.token_hex(8))}"

    def leave() -> None:
        run.create()
        try:
            sign.touch()
        except OSError as error:
            reason = f"cannot be written to ({error.strerror})"
            raise UserError("--output", run.path, reason, "choose another folder") from None

    ranks.on_first(leave)
    deadline = time.monotonic() + _SIGHT
    while not (seen := sign.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = ranks.gather([] if seen else [f"rank {ranks.rank} on {socket.gethostname()}"])
    ranks.on_first(lambda: sign.unlink(missing_ok=True))
    if blind:
        reason = f"{', '.join(blind[:3])} does not see what the first rank writes there: the folder is not shared"
        raise UserError("--output", run.path, reason, "choose a folder on storage that all nodes see")
