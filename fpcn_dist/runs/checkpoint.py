"""Checkpoints: one portable file for every engine and any number of ranks.

A checkpoint is a safetensors file: tensors by name (``weights/...``, ``optimizer/<parameter>/<key>``, ``ema/...``)
and a JSON description (step, recipe, data, checksum). Nothing in it is ever unpickled. There is no generator state:
every random number of a run is drawn from a key of (seed, step, rank), so the step says it all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fpcn_dist.models import CLASS_TOKEN, build_model, knows_token_maps
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.recipe.preprocessing import Preprocessing
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import replacing, write_tensors

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8})\.safetensors")
BEST = "best.safetensors"

_HARMLESS = {
    *("name", "engine", "search"),
    *("train.micro_batches", "train.compile", "train.channels_last", "train.log_every", "train.keep_checkpoints"),
    "train.feature_bank",
    *("data.backend", "data.threads", "data.eval_batch_size", "data.max_bad_images"),
    "data.cache_gib",
    *(f"data.columns.{name}" for name in ColumnsConfig.model_fields),  # the manifest says what came of them
    *("distill.teacher", "distill.teacher_mode", "distill.bank"),
}
"""Recipe fields that may differ when a run resumes: they change how it is computed, not what."""


@dataclass
class TrainingState:
    """Everything that training goes on from, whole (never a shard), on the CPU, named as in the task's state dict.

    Attributes:
        step: updates made so far.
        weights: parameters and buffers of the task.
        optimizer: per parameter name, the optimizer's tensors (``momentum_buffer``; ``exp_avg`` ...).
        ema: parameters and buffers of the averaged model, empty without one.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
        step: updates made.
        recipe: the recipe, as nested dictionaries.
        manifest_hash: of the data set.
        classes: class names in label order.
        accuracy: on the validation images, where they were evaluated at this step.
    """

    step: int
    recipe: dict[str, Any]
    manifest_hash: str
    classes: tuple[str, ...]
    accuracy: float | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """How the run shows images to its network."""
        return Preprocessing.recorded(self.recipe.get("data", {}))


def write_checkpoint(path: Path, state: TrainingState, info: CheckpointInfo) -> None:
    """Write ``path`` whole or not at all.

    Raises:
        UserError: the disk is full or the folder not writable; files that were there stay as they were.
    """
    tensors = {f"weights/{name}": t for name, t in state.weights.items()}
    tensors |= {f"ema/{name}": t for name, t in state.ema.items()}
    tensors |= {f"optimizer/{name}/{key}": t for name, ts in state.optimizer.items() for key, t in ts.items()}
    metadata = {"fpcn_dist": str(_FORMAT), "info": json.dumps(asdict(info)), "crc32": str(_checksum(tensors))}
    write_tensors(path, tensors, metadata)


class Checkpoint(NamedTuple):
    """A checkpoint that was read, and where it lies."""

    path: Path
    state: TrainingState
    info: CheckpointInfo


def is_checkpoint(path: Path) -> bool:
    """Whether a file says of itself that it is a checkpoint of this project."""
    try:
        with safe_open(path, framework="pt") as file:
            return "fpcn_dist" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint says about itself; its tensors are not read.

    Raises:
        UserError: no such file, or not a checkpoint of this project and format.
    """
    with _opened(path) as (_, metadata):
        return _info(metadata)


def read_checkpoint(path: Path) -> tuple[TrainingState, CheckpointInfo]:
    """Read and verify a checkpoint.

    Raises:
        UserError: no such file, not a checkpoint of this project, of another format, or damaged.
    """
    with _opened(path) as (file, metadata):
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    if metadata["crc32"] != str(_checksum(tensors)):
        raise UserError("checkpoint", path, "is damaged (its checksum does not match)", "use an earlier one")
    info = _info(metadata)
    state = TrainingState(info.step, weights={}, optimizer={}, ema={})
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "optimizer":
            parameter, _, moment = name.rpartition("/")
            state.optimizer.setdefault(parameter, {})[moment] = tensor
        else:
            getattr(state, kind)[name] = tensor
    return state, info


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """The open safetensors file, of which no tensor was read yet, and its metadata."""
    if not path.is_file():
        raise UserError("checkpoint", path, "there is no such file", "give a file of RUN/checkpoints/")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "fpcn_dist" not in metadata:
                raise UserError("checkpoint", path, "was not written by fpcn_dist", "give a file of RUN/checkpoints/")
            if metadata["fpcn_dist"] != str(_FORMAT):
                reason = f"has format {metadata['fpcn_dist']}, this version of fpcn_dist reads format {_FORMAT}"
                raise UserError("checkpoint", path, reason, "use the version of fpcn_dist that wrote it")
            yield file, metadata
    except (SafetensorError, OSError) as error:
        raise UserError("checkpoint", path, f"is damaged or no checkpoint ({error})", "use an earlier one") from None


def _info(metadata: dict[str, str]) -> CheckpointInfo:
    values = json.loads(metadata["info"])
    return CheckpointInfo(**values | {"classes": tuple(values["classes"])})


class CheckpointFolder:
    """The checkpoints of one run: the last ``keep`` and the best. Use as a context manager around what saves.

    Files are written by a thread, so that training goes on meanwhile; leaving the context waits for the last one.

    Args:
        folder: ``RUN/checkpoints``; made when the first one is written.
        keep: how many to keep beside the best.
        warn: called with a sentence when a damaged checkpoint is passed over.
    """

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None] = print) -> None:
        self.folder, self.keep, self.warn = folder, keep, warn
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, as it was read; damaged ones are reported and passed over.

        Raises:
            UserError: there are checkpoints, but none of them is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return Checkpoint(self.path(step), *read_checkpoint(self.path(step)))
            except UserError as error:
                self.warn(f"warning: {error.value} {error.reason}; going on from the one before")
        if steps:
            reason = f"none of the {len(steps)} checkpoints is whole"
            hint = "start again with another --output, or with --resume never"
            raise UserError("checkpoints", self.folder, reason, hint)
        return None

    def best(self) -> Checkpoint | None:
        """The best checkpoint; ``None`` where nothing was validated.

        Raises:
            UserError: it is damaged.
        """
        path = self.folder / BEST
        return Checkpoint(path, *read_checkpoint(path)) if path.exists() else None

    def best_accuracy(self) -> float | None:
        """Validation accuracy of the best checkpoint, where there is one; its tensors are not read."""
        try:
            return read_info(self.folder / BEST).accuracy
        except UserError:
            return None

    def save(self, state: TrainingState, info: CheckpointInfo, *, best: bool) -> None:
        """Write the checkpoint of ``info.step``, name it the best if it is, and delete those too old to keep.

        Returns while the file is being written; ``state`` must not change any more. :meth:`wait` tells how it went.
        """
        self.wait()
        self._writing = self._writer.submit(self._write, state, info, best)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            UserError: it could not be written; the checkpoints before it are all still there.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, state: TrainingState, info: CheckpointInfo, best: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(info.step)
        if best:  # first, as a run that ended in between would go on from this step without evaluating it again
            write_checkpoint(self.folder / BEST, state, info)
            with replacing(path) as temporary:
                os.link(self.folder / BEST, temporary)
        else:
            write_checkpoint(path, state, info)
        for step in self.steps()[: -self.keep]:
            self.path(step).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete every checkpoint of the run."""
        for path in [self.folder / BEST, *map(self.path, self.steps())]:
            path.unlink(missing_ok=True)


def require_same_recipe(recipe: Recipe, info: CheckpointInfo, path: Path) -> None:
    """Refuse to resume with a recipe that would compute something else.

    Raises:
        UserError: naming each field that changed, with both values; or a checkpoint of a network whose tokens were
            not yet a map.
    """
    before = _flat(_in_todays_fields(info.recipe)) | _flat({"data": info.preprocessing.model_dump()})
    # What the recipe leaves to the network was settled when the run began.
    now = _flat(recipe.with_preprocessing(info.preprocessing).model_dump())
    fields = sorted(before.keys() | now.keys())
    changed = [f"{f} {before.get(f)!r} -> {now.get(f)!r}" for f in fields if before.get(f) != now.get(f)]
    changed = [line for line in changed if not _harmless(line.split(" ", 1)[0])]
    if changed:
        what = "of another model" if any(line.startswith("model.") for line in changed) else "of another recipe"
        hint = "use the recipe that the run started with (recipe.yaml in its folder), or another --output"
        raise UserError("checkpoint", path, f"is {what}: {', '.join(changed)}", hint)
    dated = not knows_token_maps(info.recipe.get("model", {}))
    if dated and build_model(recipe.model.changed(pretrained=False), 2, task=recipe.task).backbone.ends_in_tokens:
        raise UserError("checkpoint", path, CLASS_TOKEN, "train anew with another --output")


def _in_todays_fields(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of any version: what an older one did not know was as it is by default."""
    try:
        return Recipe.model_validate(recipe).model_dump()
    except ValidationError:  # of a newer version, whose fields are to be named
        return recipe


def _harmless(field: str) -> bool:
    return field in _HARMLESS or field.split(".")[0] in _HARMLESS


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _checksum(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        data: Any = tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return crc


def model_weights(state: TrainingState) -> dict:
    """State dict of the bare model in ``state``: the moving average where there is one."""
    prefix, tensors = ("module.", state.ema) if state.ema else ("model.", state.weights)
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
