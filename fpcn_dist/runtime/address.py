"""Where a data set lies: at a path of this machine, or at the URL of a folder of an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_LOCAL = re.compile(r"(?:file|local)://(?=/)")


def is_url(text: str) -> bool:
    """Whether a text is a URL as fsspec reads it (``s3://bucket/folder``), and no path of this machine."""
    return "://" in text


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of an object store, by its URL.

    It answers what is asked of the path of a data folder of this machine, which would fold the two slashes of a URL.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def resolve(self) -> RemoteFolder:
        return self

    def absolute(self) -> RemoteFolder:
        return self


Address = Path | RemoteFolder
"""What ``--data`` names."""


def address(text: str) -> Address:
    """The address that a user wrote; ``file://`` URLs are paths of this machine."""
    text = _LOCAL.sub("", text)
    return RemoteFolder(text.rstrip("/")) if is_url(text) else Path(text)
