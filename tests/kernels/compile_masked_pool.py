"""What the compiler makes of masked_pool's launches, as JSON. Needs no GPU, and no interpreter.

python -m tests.kernels.compile_masked_pool specialisations | loads ARCH
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter

import torch
from fpcn_kernels._launch import LaunchRecord, recording
from fpcn_kernels.pooling import backend_triton, plan

from benchmarks._compile import compile_code, specialize

LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
BATCHES = (1, 40, 41, 42, 43, 256)


def launches(features: torch.Tensor, largest: bool = False, companion: bool = False) -> list[LaunchRecord]:
    before = torch.empty_like(features[:, ::2]) if companion else None
    with recording() as records:
        pooled, mask, area = backend_triton.forward(features, before, 0.1, largest)
        order = sorted(range(4), key=features.stride, reverse=True)
        backend_triton.backward(pooled, mask, area, 0.1, features.dtype, order)
    return records


def specialisations() -> dict[str, list[list[str]]]:
    """For each kind of call the keys of its launches, a list for each batch size."""
    keys = {}
    for layout, memory_format in LAYOUTS.items():
        for region in ({}, {"largest": True}, {"largest": True, "companion": True}):
            # On the CPU and not the meta device, as the alignment of an address is a part of the key.
            features = (
                torch.empty(batch, 64, 14, 14, dtype=torch.bfloat16, memory_format=memory_format) for batch in BATCHES
            )
            keys[f"{layout} {region}"] = [
                [f"{record[0].__name__} {specialize(record, 90)[0].hash()}" for record in launches(values, **region)]
                for values in features
            ]
    return keys


def loads(arch: int) -> dict[str, dict[str, dict[int, int]]]:
    """How many of a kernel's loads of features take how many bytes, of 14 x 14 pixels in bfloat16."""
    widths = {}
    for layout, memory_format in LAYOUTS.items():
        features = torch.empty(42, 2048, 14, 14, dtype=torch.bfloat16, device="meta").to(memory_format=memory_format)
        widths[layout] = {
            record[0].__name__: feature_loads(compile_code(record, arch).sass) for record in launches(features)[:2]
        }
        widths[layout]["fold"] = plan.view(features).fold
    return widths


def feature_loads(sass: str) -> dict[int, int]:
    """Features are what is loaded with a hint for the cache: to keep them (EL), or to let them go (EF)."""
    suffixes = re.findall(r"\bLDG\.E\.E[LF]([\w.]*)", sass)
    bits = (re.search(r"\.U?(8|16|64|128)\b", suffix) for suffix in suffixes)
    return dict(Counter(int(width[1]) // 8 if width else 4 for width in bits))


if __name__ == "__main__":
    print(json.dumps(specialisations() if sys.argv[1] == "specialisations" else loads(int(sys.argv[2]))))
