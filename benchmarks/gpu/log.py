"""The file of measurements: one JSON object a line, appended as soon as it is known."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
_CODE = ("kernels", "fpcn_dist", "benchmarks")
_VERSIONS = ("torch", "triton", "numpy", "torchvision", "timm")


class Measurement(NamedTuple):
    """One entry of the plan."""

    part: str
    """``tests``, ``kernels``, ``step``, ``train`` or ``profile``."""
    name: str
    settings: dict[str, Any]
    seconds: float
    """It takes about so long: it is not begun with less time left."""
    run: Callable[[], dict[str, Any]]
    """Gives the figures; ``{"skipped": why}`` where there are none."""

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name} {value}" for name, value in self.settings.items())])


class Log:
    """Measurements of one device with the code as it is now: ``FOLDER/DATE-DEVICE.jsonl``, or the file of another day
    where this code's measurements were begun.

    Args:
        folder: where the file is, or will be.
        device: the name of the GPU.
    """

    def __init__(self, folder: Path, device: str) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self._always = {"code": _digest(), "commit": _commit(), "device": device, "versions": _versions()}
        begun = [path for path in sorted(folder.glob(f"*-{slug}.jsonl")) if self._always["code"] in path.read_text()]
        self.path = begun[-1] if begun else folder / f"{datetime.date.today()}-{slug}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._done = {_key(line) for line in read(self.path) if line["code"] == self._always["code"]}

    def has(self, measurement: Measurement) -> bool:
        """Whether it was made before, with the same settings and code."""
        return _key(measurement._asdict()) in self._done

    def append(self, part: str, name: str, settings: dict[str, Any], figures: dict[str, Any]) -> None:
        """Write a line, with the date and what it was measured with."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        line = {"part": part, "name": name, "settings": settings, **figures, "date": now, **self._always}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._done.add(_key(line))


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of the file, if it is there; without one that was being written when the power went."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and values.keys() >= {"part", "name", "settings", "code", "device"}:
            yield values


def _key(line: dict[str, Any]) -> str:
    return json.dumps([line["part"], line["name"], line["settings"]], sort_keys=True)


def _digest() -> str:
    """Of all Python files that a measurement may run: a copy of the tree need not have its history."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
