"""How seldom a command looks through its old objects."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import atexit, gc, weakref
from fpcn_dist.runtime.collection import collect_seldom

class Cycle:
    def __init__(self):
        self.own = self

def collections():
    return [generation["collections"] for generation in gc.get_stats()]

atexit.register(lambda: print("frozen", gc.get_freeze_count() > 1000))  # called last
collect_seldom()
gc.collect()
before, garbage = collections(), weakref.ref(Cycle())
kept = [[] for _ in range(700 * 10 * 40)]  # which would set off three collections of everything
young, middle, everything = (now - then for now, then in zip(collections(), before))
print("collected", young > 300, middle > 30, everything, garbage() is None)
"""


def test_a_command_looks_through_old_objects_seldom_and_not_at_its_end():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["collected True True 0 True", "frozen True"], done.stderr
