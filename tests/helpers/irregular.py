"""What has the name of a photograph and is no regular file, some of which would be waited for without end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

NOT_REGULAR = "cannot be read (not a regular file)"
REASONS = {
    "circle.jpg": "cannot be read (Too many levels of symbolic links)",
    "device.jpg": NOT_REGULAR,
    "nowhere.jpg": "cannot be read (No such file or directory)",
    "pipe.jpg": NOT_REGULAR,
    "socket.jpg": "cannot be read (No such device or address)",
}
"""Why each of them cannot be read."""


def make_irregular(folder: Path) -> None:
    """Make the files of :data:`REASONS`, and a folder called folder.jpg."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "nowhere.jpg").symlink_to("gone.jpg")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    here = os.getcwd()
    try:
        os.chdir(folder)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket.jpg")
    finally:
        os.chdir(here)
