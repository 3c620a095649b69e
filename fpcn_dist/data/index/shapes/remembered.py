"""What was found out about a large file, kept in the user's cache folder until the file changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fpcn_dist.data.blob import file_state
from fpcn_dist.data.index.check.images import cache_file
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text


def remembered(file: Path, kind: str, look: Callable[[Path], Any]) -> Any:
    """What ``look`` says of a file, as JSON has it; asked again only where the file has changed since.

    Args:
        file: what is looked at.
        kind: names what is looked for and how; other kinds are remembered beside it.
        look: returns lists, dicts, words and numbers.

    Raises:
        OSError: there is no such file.
        UserError: as ``look``.
    """
    state = file_state(file)
    if state is None:
        raise FileNotFoundError(0, "No such file", os.fspath(file))
    name = hashlib.sha256(os.fsencode(file.resolve()) + kind.encode()).hexdigest()[:24]
    cache = cache_file(file).with_name(f"index-{name}.json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["state"] == list(state):
            return content["found"]
    text = json.dumps({"state": state, "found": look(file)})
    # A cache that cannot be written costs time at the next start, and must not stop this one.
    with contextlib.suppress(OSError, UserError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_text(cache, text)
    return json.loads(text)["found"]
