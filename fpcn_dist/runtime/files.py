"""Files written whole or not at all: whoever reads, or kills, a run sees the old file or the new one, never half.

Machines that only run an ONNX model use this too: torch and safetensors are imported where tensors are written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fpcn_dist.runtime.errors import Outage, UserError
from fpcn_dist.runtime.names import ESCAPE

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")
_REFUSED = {
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR),
    *(errno.EACCES, errno.EPERM, errno.ENOTTY),
}
"""How file systems say that a folder is nothing that they synchronise, rather than that a disk has failed."""


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
        _sync_folder(path.parent)
    except OSError as error:
        reason = f"could not be written ({error.strerror or error})"
        raise Outage("file", path, reason, "free some space there or choose another --output folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk, on file systems that can be asked to."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; where the file system knows no hard links, or does not allow this one, copy it.

    Raises:
        OSError: neither is possible.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8; see :func:`replacing`. What is not UTF-8 in a name is escaped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=ESCAPE)


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
