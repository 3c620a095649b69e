"""Compiles every kernel at the shapes of production for one GPU, and prints what each needs as JSON.

    python tests/kernels/compile_production.py 90

Tensors are on the meta device: nothing is allocated, and no GPU is needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
from fpcn_kernels._launch import LaunchRecord, recording
from fpcn_kernels.pairs import backend_triton as pairs_triton
from fpcn_kernels.pairs.problem import Side, SideGradients
from fpcn_kernels.pairs.random import PairDropout, RandomPairs
from fpcn_kernels.pooling import backend_triton as pooling_triton
from fpcn_kernels.pooling import plan

from benchmarks._compile import compile_needs, specialize
from benchmarks._predicted import pair_instructions

DEVICE = torch.device("meta")


def run_masked_pool(
    batch: int,
    channels: int,
    size: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    largest: bool = False,
    companion: bool = False,
    l2_mib: int = 50,
) -> None:
    features = torch.empty(batch, channels, size, size, dtype=dtype, device=DEVICE).to(memory_format=memory_format)
    before = features[:, : channels // 2] if companion else None
    with patch.object(plan, "l2_bytes", lambda device: l2_mib * 2**20):
        pooled, mask, area = pooling_triton.forward(features, before, 0.1, largest)
    order = sorted(range(4), key=features.stride, reverse=True)
    pooling_triton.backward(pooled, mask, area, 0.1, dtype, order)


def run_pair_contrast(
    images: int, classes: int, width: int = 512, rounded: bool = True, dropout: float = 0.0, random: bool = False
) -> None:
    uv = torch.empty(images, 2 * width, device=DEVICE)
    G, g = (torch.empty(images, classes - 1, *size, device=DEVICE) for size in ((width,), ()))
    seed, scale = torch.empty((), dtype=torch.int64, device=DEVICE), torch.empty((), device=DEVICE)
    own, others = uv.chunk(2, 1)
    gradients = SideGradients(*(torch.empty_like(t) for t in (own, others, G, g)))
    side = Side(
        own_is_a=True,
        own_ID=own,
        others_JD=others,
        own_first=0,
        others_first=0,
        G_ILD=G,
        g_IL=g,
        labels_I=torch.empty(images, dtype=torch.int64, device=DEVICE),
        relu=True,
        dropout=PairDropout(dropout, seed, images, width, torch.float32) if dropout else None,
        chosen=RandomPairs(images, seed, images) if random else None,
        scale=scale,
        rounded=rounded,
        gradients=gradients,
    )
    pairs_triton.side_loss(side)


def launches() -> list[LaunchRecord]:
    with recording() as records:
        bf16, nhwc = torch.bfloat16, torch.channels_last
        run_masked_pool(256, 2048, 14, bf16, nhwc)
        run_masked_pool(42, 2048, 14, bf16, nhwc, largest=True, companion=True)
        run_masked_pool(42, 2048, 14, bf16, torch.contiguous_format)
        # The smaller tiles of a smaller L2.
        run_masked_pool(42, 2048, 14, bf16, nhwc, l2_mib=30)
        run_masked_pool(42, 2048, 14, bf16, torch.contiguous_format, l2_mib=30)
        run_masked_pool(42, 2048, 7, bf16, torch.contiguous_format)
        run_masked_pool(42, 2048, 7, torch.float32, torch.contiguous_format, largest=True)
        run_masked_pool(16, 256, 64, torch.float32, torch.contiguous_format, largest=True)
        for rounded in (False, True):
            for images, classes in [(336, 3), (4096, 3), (336, 8), (336, 200)]:
                run_pair_contrast(images, classes, rounded=rounded)
            run_pair_contrast(336, 3, rounded=rounded, dropout=0.5, random=True)
            run_pair_contrast(336, 200, rounded=rounded, dropout=0.5)
            run_pair_contrast(336, 3, rounded=rounded, width=2048)
    return records


def distinct(records: list[LaunchRecord], arch: int) -> Iterator[LaunchRecord]:
    """Without those that Triton would not compile anew."""
    seen = set()
    for record in records:
        source, options = specialize(record, arch)
        key = source.hash(), str(options)
        if key not in seen:
            seen.add(key)
            yield record


def instructions(arch: int) -> dict[str, dict[str, float]]:
    """Instructions for each pair and unit of a side, by precision and kernel, at N = 4,096, K = 3, D = 512."""
    counts = {}
    for name, rounded in (("float32", False), ("float16", True)):
        with recording() as records:
            run_pair_contrast(4096, 3, rounded=rounded)
        counts[name] = pair_instructions(records, 4096**2, 512, arch)
    return counts


def main() -> None:
    arch = int(sys.argv[1])
    needs = []
    for record in distinct(launches(), arch):
        found = compile_needs(record, arch)._asdict()
        needs.append({**found, "kernel": f"{found['kernel']} {json.dumps(record[3])}"})
    print(json.dumps({"needs": needs, "instructions": instructions(arch)}))


if __name__ == "__main__":
    main()
