"""Random numbers without state: every draw is a function of a key, so that a step can be repeated from its number."""

from __future__ import annotations

import numpy as np


def key(*parts: int) -> int:
    """A 63-bit seed that depends on all of ``parts`` (non-negative), for example on (seed, step, rank)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
