"""Checkpoints: one portable file for every engine and any number of ranks.

A checkpoint is a safetensors file: tensors by name (``weights/...``, ``optimizer/<parameter>/<key>``, ``ema/...``)
and a JSON description (step, recipe, data, checksum). Nothing in it is ever unpickled. There is no generator state:
every random number of a run is drawn from a key of (seed, step, rank), so the step says it all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
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
from fpcn_dist.recipe.section import flat
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import link_or_copy, replacing, write_tensors

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8})\.safetensors")
BEST = "best.safetensors"

_HARMLESS = {
    *("name", "engine", "search"),
    *("train.micro_batches", "train.compile", "train.channels_last", "train.feature_bank"),
    *("train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints"),
    *("data.backend", "data.threads", "data.eval_batch_size", "data.max_bad_images"),
    *("data.max_decoded_mib", "data.cache_gib"),
    *(f"data.columns.{name}" for name in ColumnsConfig.model_fields),  # the manifest says what came of them
    *("distill.teacher", "distill.teacher_mode", "distill.bank"),
}
"""Recipe fields that may differ when a run resumes: they change how it is computed, and what is noted, not what."""
_EXTENDED = "train.epochs"


Best = tuple[int, float]
"""Step and validation accuracy of the best checkpoint of a run."""


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
        best: step and accuracy of the best checkpoint so far, this one included; ``None`` where there is none yet.
    """

    step: int
    recipe: dict[str, Any]
    manifest_hash: str
    classes: tuple[str, ...]
    accuracy: float | None = None
    best: Best | None = None

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
    best = values.get("best")  # which earlier versions did not note
    return CheckpointInfo(**values | {"classes": tuple(values["classes"]), "best": best and tuple(best)})


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
        """The best checkpoint; ``None`` where nothing was validated, or nothing of it is left.

        Where best.safetensors is damaged or gone, the best of the others that are whole takes its place, which is
        reported.
        """
        path, reason = self.folder / BEST, "is missing"
        if path.exists():
            try:
                return Checkpoint(path, *read_checkpoint(path))
            except UserError as error:
                reason = error.reason
        infos = self._infos()
        known = infos[-1].best if infos else None
        if known is None and not path.exists():
            return None
        lost = f"warning: {path} {reason}" + (f": it was step {known[0]} with {known[1]:.4f}" if known else "")
        # Of equals the earliest, as in a run that never lost one.
        for info in sorted(infos, key=lambda info: -(info.accuracy or 0.0)):
            if info.accuracy is None:
                continue
            with contextlib.suppress(UserError):
                found = Checkpoint(self.path(info.step), *read_checkpoint(self.path(info.step)))
                with replacing(path) as temporary:
                    link_or_copy(found.path, temporary)
                self.warn(f"{lost}; the best that is left is step {info.step} with {info.accuracy:.4f}")
                return found
        self.warn(f"{lost}; no other checkpoint was validated, so the next that is counts as the best")
        return None

    def best_of(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The best checkpoint as of another one of this folder, where it is still there and whole."""
        info = checkpoint.info
        known = info.best or (None if info.accuracy is None else (info.step, info.accuracy))
        if known is None:
            return None
        if known[0] == info.step:
            return checkpoint
        for path in (self.folder / BEST, self.path(known[0])):
            with contextlib.suppress(UserError):
                found = Checkpoint(path, *read_checkpoint(path))
                if found.info.step == known[0] and found.info.manifest_hash == info.manifest_hash:
                    return found
        where = f"the best so far, step {known[0]} with {known[1]:.4f}, is not beside {checkpoint.path}"
        self.warn(f"{where}; the next evaluation counts as the best")
        return None

    def _infos(self) -> list[CheckpointInfo]:
        """What those checkpoints say that can be read, by step; their tensors are not looked at."""
        infos = []
        for step in self.steps():
            with contextlib.suppress(UserError):
                infos.append(read_info(self.path(step)))
        return infos

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
                link_or_copy(self.folder / BEST, temporary)
        else:
            write_checkpoint(path, state, info)
        for step in self.steps()[: -self.keep]:
            self.path(step).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete every checkpoint of the run."""
        for path in [self.folder / BEST, *map(self.path, self.steps())]:
            path.unlink(missing_ok=True)


def changed_fields(recipe: Recipe, info: CheckpointInfo, *, extend: bool = False) -> list[str]:
    """What ``recipe`` computes otherwise, each as ``field before -> now``; nothing where a run may go on with it.

    Args:
        recipe: what is asked for now.
        info: what a run or a checkpoint says of itself.
        extend: whether it may be trained for more epochs.
    """
    before = flat(_in_todays_fields(info.recipe)) | flat({"data": info.preprocessing.model_dump()})
    # What the recipe leaves to the network was settled when the run began.
    now = flat(recipe.with_preprocessing(info.preprocessing).model_dump())
    fields = [f for f in sorted(before.keys() | now.keys()) if before.get(f) != now.get(f) and not _harmless(f)]
    if extend and before.get(_EXTENDED, 0) < now[_EXTENDED]:
        fields = [field for field in fields if field != _EXTENDED]
    return [f"{field} {before.get(field)!r} -> {now.get(field)!r}" for field in fields]


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe as it was written, without the fields that a run may change on its way."""
    fields = {name: value for name, value in flat(dict(recipe)).items() if not _harmless(name)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def require_same_recipe(recipe: Recipe, info: CheckpointInfo, path: Path, *, extend: bool = False) -> None:
    """Refuse to resume with a recipe that would compute something else.

    Args:
        recipe, info, extend: see :func:`changed_fields`.
        path: of the checkpoint.

    Raises:
        UserError: naming each field that changed, with both values; or a checkpoint of a network whose tokens were
            not yet a map.
    """
    changed = changed_fields(recipe, info, extend=extend)
    if changed:
        what = "of another model" if any(line.startswith("model.") for line in changed) else "of another recipe"
        hint = "use the recipe that the run started with (recipe.yaml in its folder), or another --output"
        if not changed_fields(recipe, info, extend=True):
            hint = "add --extend to train on for more epochs, or use another --output"
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
