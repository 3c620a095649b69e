"""Random numbers without state: every draw is a function of a key, so that a step can be repeated from its number."""

from __future__ import annotations

import numpy as np
import torch


def key(*parts: int) -> int:
    """A 63-bit seed that depends on all of ``parts`` (non-negative), for example on (seed, step, rank)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed PyTorch's generators of the CPU and of this device alone.

    ``torch.manual_seed`` seeds all kinds of devices, which takes longer than a training step of a small head: where a
    kind is missing, it notes the stack of the call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
