"""Are these files images? Each one is decoded once by the decoder that training uses, and the answer is remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.backends import Decoder, has_dali, open_backend
from fpcn_dist.recipe.schema import DecodingBackend
from fpcn_dist.runtime.cores import usable_cores
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text
from fpcn_dist.runtime.names import printable
from fpcn_dist.runtime.terminal import Terminal

_PROGRESS_FROM = 2000
"""Files to check from which on a progress bar is worth showing (a few seconds)."""


@dataclass(frozen=True)
class Check:
    """What was found out about a file.

    Attributes:
        reason: why it is not usable, or ``None`` where it is.
        digest: SHA-256 of its content in hexadecimal; empty where the file could not be read.
        size: bytes.
    """

    reason: str | None
    digest: str
    size: int

    @property
    def ok(self) -> bool:
        return self.reason is None


class Refused(NamedTuple):
    """An image that was left out: its path relative to the data folder, and why."""

    path: str
    reason: str


def check_images(
    paths: Sequence[Path], max_pixels: int, cache: Path | None = None, *, backend: DecodingBackend = "auto"
) -> list[Check]:
    """Read and decode files, or recall what doing so gave before, in the order of ``paths``.

    Prints a line where the backend is not the one that is preferred.

    Args:
        paths: image files.
        max_pixels: files whose header announces more pixels are refused without being decoded.
        cache: a file that remembers results by path, size and modification time; ``None`` remembers nothing. Several
            processes may share it: it is replaced as a whole, and what the loser of a race found is found again.
        backend: the recipe's ``data.backend``.

    Raises:
        UserError: the backend is not installed.
    """
    if backend == "auto" and not has_dali():
        print("DALI is not installed: torchvision decodes the images, on the CPU (data.backend auto)", flush=True)
    opened = open_backend(backend)
    key = f"{opened.version}/{max_pixels}"
    known = _load(cache, key) if cache else {}
    states = [_state(path) for path in paths]
    names = [os.fspath(path.absolute()) for path in paths]
    stale = [i for i, name in enumerate(names) if states[i] is None or known.get(name, [None])[0] != states[i]]

    local = threading.local()

    def check(i: int) -> Check:
        if not hasattr(local, "decoder"):
            local.decoder = opened.decoder()
        return check_image(Blob(os.fspath(paths[i])), max_pixels, local.decoder)

    with ThreadPoolExecutor(usable_cores()) as pool:
        results = track(
            pool.map(check, stale),
            description="Checking images",
            total=len(stale),
            console=Console(stderr=True),
            transient=True,
            disable=len(stale) < _PROGRESS_FROM,
        )
        fresh = dict(zip(stale, results, strict=True))

    checks = [fresh[i] if i in fresh else Check(*known[name][1:]) for i, name in enumerate(names)]
    if cache and stale:
        news = {names[i]: [states[i], c.reason, c.digest, c.size] for i, c in fresh.items() if states[i] and c.digest}
        _save(cache, key, known | news)
    return checks


def check_image(blob: Blob, max_pixels: int, decoder: Decoder) -> Check:
    """Read and decode one image."""
    try:
        data = blob.read()
    except OSError as error:
        return Check(f"cannot be read ({error.strerror})", "", 0)
    return Check(_fault(data, max_pixels, decoder), hashlib.sha256(data).hexdigest(), len(data))


def _fault(data: bytes, max_pixels: int, decoder: Decoder) -> str | None:
    """Why an image file cannot be used, or ``None`` where it can.

    The number of pixels is read from the header, and nothing is decoded where it exceeds ``max_pixels``.
    """
    if not data:
        return "the file is empty"
    size = decoder.size(data)
    if size is None:
        return "not a JPEG, PNG, WebP, BMP or TIFF image, or its header is damaged"
    width, height = size
    if width * height > max_pixels:
        found = f"{width} x {height} = {width * height:,} pixels"
        return f"its header announces {found}, more than data.max_pixels {max_pixels:,}"
    return None if decoder.decodes(data) else "the image data are truncated or damaged"


def cache_file(root: Path) -> Path:
    """Where the checks of a data folder are remembered: in the user's cache folder, one file for each data folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "fpcn-dist" / f"images-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"


def refusal_table(refused: Sequence[Refused]) -> Table:
    """Which images were refused, and why, for the terminal."""
    table = Table("image", "why it was refused", title=f"{len(refused)} image(s) refused")
    for path, reason in refused:
        table.add_row(Text(printable(path)), Text(printable(reason)))
    return table


def show_refused(refused: Sequence[Refused]) -> None:
    """Print which images were refused, and why; nothing is printed where none was."""
    if refused:
        Terminal().print(refusal_table(refused))


def _state(path: Path) -> list[int] | None:
    """Size and modification time: what must not have changed for a remembered result to hold."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _load(cache: Path, key: str) -> dict[str, list]:
    """Remembered results; none where the file is missing, damaged, or of another decoder or bound."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        return content["files"] if content["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _save(cache: Path, key: str, files: dict[str, list]) -> None:
    # A cache that cannot be written costs time at the next start, and must not stop this one.
    with contextlib.suppress(OSError, UserError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_text(cache, json.dumps({"key": key, "files": files}))
