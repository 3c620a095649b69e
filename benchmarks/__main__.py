"""Measures parts of the system on this machine: ``python -m benchmarks NAME [options]``; ``NAME --help`` lists these.

Each benchmark is imported alone: those of the operations need torch, triton, numpy and rich, and nothing else.
"""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "masked_pool": ("benchmarks.masked_pool", "masked pooling beside eager PyTorch and torch.compile"),
    "pair_contrast": ("benchmarks.pair_contrast", "the loss over pairs beside eager PyTorch and torch.compile"),
    "step": ("benchmarks.step", "a training step of FPCN beside the plain classifier's"),
    "gpu": ("benchmarks.gpu.command", "all that needs a GPU: tests, kernels, steps, a training, profiles"),
    "table": ("benchmarks.gpu.table", "a file that `gpu` has written"),
    "loader": ("benchmarks.loader", "the data pipeline beside torchvision's DataLoader"),
    "backbones": (
        "benchmarks.backbones",
        "which of timm's networks give a feature map: the table of docs/backbones.md",
    ),
    "inference": ("benchmarks.inference", "a frozen backbone on the CPU: onnxruntime beside eager PyTorch"),
    "distill": ("benchmarks.distill", "all students at once beside one after the other"),
    "features": ("benchmarks.features", "a head on features computed once beside computed in every step"),
    "scaling": ("benchmarks.scaling.tables", "bytes and memory of each rank; step times on many GPUs, computed"),
}


def main(words: list[str]) -> None:
    if words and words[0] in BENCHMARKS:
        sys.argv[:2] = [f"python -m benchmarks {words[0]}"]
        importlib.import_module(BENCHMARKS[words[0]][0]).main()
        return
    listed = "\n".join(f"    {name:<14} {what}" for name, (_, what) in BENCHMARKS.items())
    usage = f"usage: python -m benchmarks NAME [options]\n\n{listed}\n\nNAME --help lists the options of a benchmark."
    if words in (["--help"], ["-h"]):
        print(usage)
        return
    named = f"there is no benchmark {words[0]!r}\n" if words else ""
    print(f"{named}{usage}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
