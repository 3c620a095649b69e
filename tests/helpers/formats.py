"""What becomes of every kind of file that people have: docs/data.md has the table.

python -m tests.helpers.formats      writes the table anew, of what all readings agree about
"""

from __future__ import annotations

import contextlib
import pkgutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from fpcn_dist.data.batch import BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.backends import has_dali, open_backend
from fpcn_dist.data.decoding.formats.exif import TURNS
from fpcn_dist.data.decoding.formats.header import UnreadableError
from fpcn_dist.data.index.check.checker import Decoder
from fpcn_dist.data.views import centre_views
from fpcn_dist.deploy.onnx_predict import read_image
from fpcn_dist.recipe.schema import DataConfig, DecodingBackend
from tests.helpers.kinds_of_files import SIDE, Kind, Pixels, kinds

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
BEGIN, END = "<!-- formats: begin -->\n", "<!-- formats: end -->\n"
MAX_PIXELS = 10_000
_CONFIG = DataConfig(resize=SIDE, crop=SIDE, mean=(0, 0, 0), std=(1, 1, 1), max_pixels=MAX_PIXELS)


class Reading(NamedTuple):
    """What all readings made of one kind: pixels by orientation as each has them, or the reasons of their refusals."""

    kind: Kind
    pixels: dict[int, dict[str, Pixels]]
    refusals: dict[str, str]


def decoder_of(backend: DecodingBackend) -> Decoder:
    """What checks files for a backend, in this process."""
    return pkgutil.resolve_name(open_backend(backend).decoder)()


def read_all(folder: Path, which: list[Kind]) -> list[Reading]:
    """Each kind in all orientations by DALI on the CPU (where it is installed), by torchvision, and by Pillow alone."""
    backends: list[DecodingBackend] = ["torchvision", "dali"] if has_dali() else ["torchvision"]
    decoders = {name: decoder_of(name) for name in backends}
    readings, shown = [], []
    for number, kind in enumerate(which):
        reading = Reading(kind, {}, {})
        readings.append(reading)
        for turn in TURNS if kind.turns else [1]:
            path = folder / f"{number}-{turn}"
            path.write_bytes(kind.make(turn))
            faults = {name: decoder.fault(path.read_bytes(), MAX_PIXELS) for name, decoder in decoders.items()}
            reading.refusals.update({name: fault for name, fault in faults.items() if fault})
            reading.pixels[turn] = {}
            try:
                reading.pixels[turn]["pillow"] = read_image(Blob(str(path)), SIDE, SIDE, "squeeze", "bilinear")
            except UnreadableError as error:
                reading.refusals["pillow"] = str(error)
            if not reading.refusals:
                shown.append((reading, turn, path))
    request = BatchRequest(Blob.of_files(path for _, _, path in shown), centre_views(len(shown)))
    for name in backends:
        decoding = open_backend(name).decoding(iter([request]), _CONFIG, torch.device("cpu"), len(shown), 2)
        with contextlib.closing(decoding):
            images = (decoding.next().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        for (reading, turn, _), image in zip(shown, images, strict=True):
            reading.pixels[turn][name] = image
    return readings


def table(readings: list[Reading]) -> str:
    """What became of each kind, in Markdown."""
    lines = ["| Format | Pixels | EXIF orientation | What happens |", "|---|---|---|---|"]
    for kind, _, refusals in readings:
        happens = f"refused: {next(iter(refusals.values()))}" if refusals else "read"
        turned = "1 to 8" if kind.turns else "" if refusals else "has none"
        lines.append(f"| {kind.form} | {kind.pixels} | {turned} | {happens} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = table(read_all(Path(place), kinds()))
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}{made}{END}{rest.split(END)[1]}", encoding="utf-8")
    print(made)
