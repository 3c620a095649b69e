"""Results of a reproduction as they might be, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fpcn_dist.studies.reproduce.tables import Comparison, Heatmap, ReproductionResults, Row, RunRecord, Score, Table

HOSTILE = "<script>alert('1')</script> & {{ 7 * 7 }} $x^2$ | `a` *b*"
SEEDS = (0, 1, 2)
REASON = "seed 2 failed: no memory left on the device"
LOST = "FPCN-huge: the backbone's weights cannot be had"

_TABLE2 = (
    ("AlexNet", "", 96.8, 73.1, (64.2, 66.1, 65.0)),
    ("LeNet", "", 50.1, 50.5, (48.1, 47.5, 51.2)),
    ("GoogLeNet", "", 86.6, 76.3, (78.4, 80.1, 79.2)),
    ("ResNet-50", "", 79.6, 72.4, (81.0, 83.2, 82.1)),
    ("Bilinear CNN", "VGG16", 85.4, 85.3, (84.9, 86.2, 85.0)),
    ("PCA-Net", "ResNet-101", 94.9, 90.8, (88.1, 87.2)),
    ("API-Net", "ResNet-101", 99.8, 91.2, (89.1, 90.2, 90.1)),
    ("MMAL-Net", "ResNet-50", 99.7, 91.9, ()),
    ("FPCN", "ResNet-101", 99.8, 93.1, (91.1, 92.3, 91.6)),
)
_TABLE3 = (
    (("✓", "", ""), 92.0, (90.2, 90.1, 91.0)),
    (("", "✓", ""), 91.2, (89.2, 89.9, 90.3)),
    (("✓", "", "✓"), 92.2, (90.0, 91.3, 91.1)),
    (("✓", "✓", ""), 92.8, (91.0, 91.2, 91.3)),
    (("✓", "✓", "✓"), 93.1, (91.1, 92.3, 91.6)),
)
_TABLE4 = (
    ("FPCN (teacher)", (46.06, 46.06, 56.42, 56.42, 21.8, 13.98), 93.1, None, (91.1, 92.3, 91.6), ()),
    ("ResNet-18", (11.44, 11.89, 7.296, 14.588, 3.1, 2.61), 73.8, 74.7, (79.8, 80.2, 80.9), (85.2, 86.1, 85.8)),
    ("MobileNetV2", (3.5, 3.4, 1.252, 2.16, 1.013, 0.64), 70.9, 73.5, (77.1, 78.2, 77.5), (83.3, 84.1, 82.7)),
    ("ShuffleNetV2", (2.48, 3.4, 1.184, 1.894, 0.9, 0.73), 70.5, 73.6, (76.1, 77.2, 76.4), (82.3, 82.1, 81.7)),
)
_AREAS = (
    ("0-25%", 112.0, (78.2, 80.1, 79.4), (71.2, 73.0, 70.8)),
    ("25-50%", 640.0, (90.2, 91.1, 90.4), (88.2, 89.0, 88.8)),
    ("50-75%", 1201.0, (93.2, 93.1, 93.4), (93.0, 92.8, 93.1)),
    ("75-100%", None, (), ()),
)


def fabricate(output: Path) -> ReproductionResults:
    """All tables, with three seeds, a row that lacks one and a row without any; images of Figure 5 below ``output``."""
    table2 = [
        _row(name, (backbone,), (Score(train, tuple(score + 5 for score in test)), Score(paper, test)))
        for name, backbone, train, paper, test in _TABLE2
    ]
    parts = [_row(f"setting {number}", *_one(*entry)) for number, entry in enumerate(_TABLE3, start=1)]
    students = [
        Row(name, costs, (Score(before, baseline), Score(after, distilled)), _runs(name))
        for name, costs, before, after, baseline, distilled in _TABLE4
    ]
    pairs = [
        _row(system, (count,), (Score(None, tuple(best - 900 / (count + 80) + 0.4 * seed for seed in SEEDS)),))
        for system, best in (("FPCN", 92.4), ("API-Net", 91.0), ("PCA-Net", 89.5))
        for count in (28.0, 112.0, 441.0, 861.0)
    ]
    areas = [
        Row(name, (area, images and images - place), (Score(None, scores[place]),), _runs(name))
        for place, name in enumerate(("with alpha", "without alpha"))
        for area, images, *scores in _AREAS
    ]
    return ReproductionResults(
        "/data/rock photographs",
        "tiny",
        "test",
        1953,
        SEEDS,
        (
            Table(
                "table2",
                "Table 2: systems",
                "system",
                ("backbone",),
                ("training accuracy, %", "test accuracy, %"),
                tuple(table2),
                "Training accuracy: of the last epoch's batches, cropped and flipped at random.",
            ),
            Table(
                "table3",
                "Table 3: parts of FPCN",
                "setting",
                ("mask", "center loss", "alpha"),
                ("test accuracy, %",),
                tuple(parts),
                "",
            ),
            Table(
                "table4",
                "Table 4: distillation",
                "network",
                ("parameters, M", "paper", "GFLOPs", "paper ", "ms", "paper  "),
                ("baseline, %", "distilled, %"),
                tuple(students),
                "Every student learns from FPCN of the same seed.",
            ),
            Table(
                "figure3",
                "Figure 3: pairs in a batch",
                "system",
                ("pairs in a batch",),
                ("test accuracy, %",),
                tuple(pairs),
                "The batch grows with its pairs: n images make n (n - 1) / 2.",
            ),
            Table(
                "figure4",
                "Figure 4: mask intensity",
                "network",
                ("object area", "images"),
                ("test accuracy, %",),
                tuple(areas),
                "Areas are those of the network with alpha.",
            ),
        ),
        tuple(_comparison(output, number) for number in range(4)),
    )


def _one(details: tuple[str, ...], paper: float, ours: tuple[float, ...]) -> tuple[tuple[str, ...], tuple[Score]]:
    return details, (Score(paper, ours),)


def _row(name: str, details: Sequence[str | float | None], scores: tuple[Score, ...]) -> Row:
    missing = len(SEEDS) - len(scores[-1].ours)
    reason = {0: "", 1: REASON, 3: LOST}[missing]
    return Row(name, tuple(details), scores, _runs(f"{name}-{details[-1]}")[: len(SEEDS) - missing], reason)


def _runs(name: str) -> tuple[RunRecord, ...]:
    folders = [f"runs/{name.lower().replace(' ', '-')}-{seed}" for seed in SEEDS]
    return tuple(
        RunRecord(
            folder,
            seed,
            f"python launch/train.py --recipe launch/recipes/fpcn_small.yaml --data '/data/rock "
            f"photographs' --output {folder} --seed {seed}",
            "9c110457",
            "NVIDIA H100 80GB HBM3",
        )
        for folder, seed in zip(folders, SEEDS, strict=True)
    )


def _comparison(output: Path, number: int) -> Comparison:
    """An image and two drawings over it, all noise; FPCN is right about all but one, the baseline about none."""
    folder = output / "figure5"
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(number)
    for name in ("image", "1", "2"):
        noise = Image.fromarray(draw.integers(0, 255, (256, 256, 3), np.uint8))
        noise.save(folder / f"{number}-{name}.jpg", quality=30)
    heatmaps = (
        Heatmap("ResNet-101", "marble", 0.521, f"figure5/{number}-1.jpg"),
        Heatmap("FPCN", "marble" if number == 3 else "basalt", 0.974, f"figure5/{number}-2.jpg"),
    )
    return Comparison(f"basalt/IMG_20191104_1{number}.jpg", "basalt", f"figure5/{number}-image.jpg", heatmaps)
