"""When Python looks for garbage. A process that trains keeps half a million objects of imported modules to its end."""

from __future__ import annotations

import atexit
import gc

_BETWEEN = 200
"""Collections of the middle generation between two that look through all objects; Python's own number is 10."""


def collect_seldom() -> None:
    """Let this process look through its old objects seldom, and not at all while the interpreter ends.

    Young garbage, such as cycles that hold tensors, is collected as always. Importing what a training needs set off
    eight collections of everything, and the interpreter's end several more: a quarter of a short run.
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _BETWEEN)
    atexit.register(gc.freeze)
