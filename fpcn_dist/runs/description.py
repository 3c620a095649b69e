"""What a folder of many trainings was begun with: a command that says something else does not go on in it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text


def describe(output: Path, file: str, now: Mapping[str, Any], what: str, *, free: Collection[str] = ()) -> None:
    """Write ``now`` to ``output``/``file`` in an empty folder, or see that the folder was begun with the same.

    Args:
        output: the folder, whose lock the caller holds.
        file: name of the description.
        now: what all results depend on, by name; as JSON has it.
        what: the folder's kind, for messages.
        free: names that may change.

    Raises:
        UserError: the folder holds something else, or the description is damaged.
    """
    path = output / file
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError("--output", path, f"is damaged ({error})", "choose another folder") from None
        changed = sorted(name for name in now if now[name] != before.get(name) and name not in free)
        if changed:
            name = changed[0]
            reason = f"holds {what} with another {name} ({before.get(name)}, now {now[name]})"
            raise UserError("--output", output, reason, "give the same command as before, or another --output")
        return
    strangers = sorted(path.name for path in output.iterdir() if path.name[0] != "." and path.name != "logs")
    if strangers:
        reason = f"holds other files ({', '.join(strangers[:3])})"
        raise UserError("--output", output, reason, "choose a new or empty folder")
    write_text(path, json.dumps(now, indent=1) + "\n")
