"""Files written whole or not at all: whoever reads, or kills, a run sees the old file or the new one, never half.

Machines that only run an ONNX model use this too: torch and safetensors are imported where tensors are written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fpcn_dist.runtime.errors import Outage, UserError

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")


def cache_home() -> Path:
    """The folder of this package in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpcn-dist"


def make_folder(path: Path) -> None:
    """Make an output folder, with all above it; one that is there already is left as it is.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"the folder cannot be made ({error.strerror})"
        raise UserError("--output", path, reason, "choose another folder") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; what was written there becomes ``path`` when the block ends well.

    The data reach the disk before the name does (fsync, then rename). A block that fails leaves ``path`` as it was.

    Raises:
        UserError: the disk is full, the folder is missing or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        reason = f"could not be written ({error.strerror or error})"
        raise Outage("file", path, reason, "free some space there or choose another --output folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replace ``path`` by a safetensors file of contiguous CPU tensors; see :func:`replacing`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, dict(metadata))
        except SafetensorError as error:  # its name for a full disk
            raise OSError(str(error)) from error


def read_record(path: Path, parse: Callable[[str], T], hint: str) -> T | None:
    """What ``parse`` makes of a text file; ``None`` where there is none.

    Raises:
        UserError: ``parse`` raises a ValueError, which says why; ``hint`` is what to do about it.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError("file", path, str(error), hint) from error
