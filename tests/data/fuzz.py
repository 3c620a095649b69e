"""Damaged image files by the thousand: nothing may die, raise or hang, and all readings must agree.

    python tests/data/fuzz.py --minutes 60 --seed 0

Every case is a small valid file (:mod:`tests.helpers.photographs`) that was damaged (:mod:`tests.helpers.damage`), both
drawn from the case's own seed. A child process (:mod:`fpcn_dist.data.index.check.checking`) lets each way of reading
decide about it, and compares the decisions, their reasons and the pixels. What is found is printed with the case's
number, ``--show NUMBER FILE`` writes that file. Byte for byte a case depends on the installed Pillow, which writes the
valid file; a fault that was found belongs into a test of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pkgutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))  # also where it is run as a file

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.index.check.checking import check_blobs
from tests.helpers.damage import damaged
from tests.helpers.photographs import FORMS

if TYPE_CHECKING:
    from fpcn_dist.data.decoding.backends import Backend

MAX_PIXELS = 100_000_000
"""As prediction from ONNX has it."""
_READINGS = "tests.data.fuzz:Readings"
_SIDE = 48
_RESIZED_APART = 2
_ROUND = 2000


class Case(NamedTuple):
    """A damaged file."""

    number: int
    form: str
    data: bytes


class Fault(NamedTuple):
    """What is wrong with the reading of a case."""

    case: Case
    what: str


def make(number: int) -> Case:
    """The case of a number; one in twenty is whole."""
    rng = Random(f"fpcn-dist {number}")
    form = rng.choice(list(FORMS))
    data = FORMS[form](rng)
    return Case(number, form, data if rng.random() < 0.05 else damaged(data, rng))


def run(cases: Iterable[Case]) -> tuple[list[Fault], Counter[str]]:
    """Read files in every way; what is wrong, and how many files were decided how."""
    with tempfile.TemporaryDirectory() as folder:
        cases, paths = list(cases), []
        for case in cases:
            paths.append(os.path.join(folder, f"{case.number}.{case.form}"))
            Path(paths[-1]).write_bytes(case.data)
        faults, decided = [], Counter[str]()
        for index, check in check_blobs(Blob.of_files(paths), _READINGS, MAX_PIXELS, seconds=20.0):
            reason = check.reason or ""
            if (verdict := reason.split(":")[0]) in ("shown", "refused"):
                decided[f"{cases[index].form} {verdict}"] += 1
            else:
                faults.append(Fault(cases[index], reason))
        return sorted(faults), decided


class Readings:
    """Every way to read a file, as one decoder for the children."""

    def __init__(self) -> None:
        import torch

        from fpcn_dist.data.decoding import backends
        from fpcn_dist.recipe.schema import DataConfig

        torch.set_num_threads(1)
        names = ["torchvision", *(["dali"] if backends.has_dali() else [])]
        self._backends = [backends.open_backend(name) for name in names]
        self._decoders = [pkgutil.resolve_name(backend.decoder)() for backend in self._backends]
        self._config = DataConfig(resize=_SIDE, crop=_SIDE, max_pixels=MAX_PIXELS, threads=1)
        self._file = os.memfd_create("case")  # which leaves nothing where this process is killed

    def fault(self, data: bytes, max_pixels: int) -> str:
        """ "refused: ..." or "shown" where all agree, else where they differ."""
        blob = self._write(data)
        verdicts = {b.name: d.fault(data, max_pixels) for b, d in zip(self._backends, self._decoders, strict=True)}
        pixels = {}
        try:
            pixels["onnx"], verdicts["onnx"] = self._by_onnx(blob), None
        except ValueError as error:
            verdicts["onnx"] = str(error)
        if len({reason is None for reason in verdicts.values()}) > 1:
            return f"they decide differently: {verdicts}"
        if len(set(verdicts.values())) > 1:
            return f"they refuse it for different reasons: {verdicts}"
        if verdicts["onnx"] is not None:
            return f"refused: {verdicts['onnx']}"
        for backend in self._backends:
            try:
                pixels[backend.name] = self._by_torch(backend, blob)
            except RuntimeError as error:
                return f"{backend.name} shows it in the check, and not in the training: {error}"
        apart = {name: int(abs(pixels[name] - pixels["onnx"]).max()) for name in pixels}
        # Pillow and PyTorch round differently where they resize.
        return "shown" if max(apart.values()) <= _RESIZED_APART else f"the pixels differ from ONNX's: {apart}"

    def close(self) -> None:
        """Free its file."""
        os.close(self._file)

    def _write(self, data: bytes) -> Blob:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)
        return Blob(f"/proc/self/fd/{self._file}")

    def _by_onnx(self, blob: Blob) -> NDArray[np.int32]:
        from fpcn_dist.deploy.onnx_predict import read_image

        return read_image(blob, _SIDE, _SIDE, "squeeze", "bilinear").astype(np.int32)

    def _by_torch(self, backend: Backend, blob: Blob) -> NDArray[np.int32]:
        import torch

        from fpcn_dist.data.batch import BatchRequest
        from fpcn_dist.data.views import centre_views

        requests = iter([BatchRequest([blob], centre_views(1))])
        decoding = backend.decoding(requests, self._config, torch.device("cpu"), 1, 1)
        with contextlib.closing(decoding):
            normalised_CHW = decoding.next()[0].numpy()
        shown = self._config.preprocessing
        mean, std = (np.array(value).reshape(3, 1, 1) for value in (shown.mean, shown.std))
        return (255 * (normalised_CHW * std + mean)).round().astype(np.int32).transpose(1, 2, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--show", nargs=2, metavar=("NUMBER", "FILE"), help="write the file of a case, and end")
    args = parser.parse_args()
    if args.show:
        Path(args.show[1]).write_bytes(make(int(args.show[0])).data)
        return 0
    began, number, found, decided = time.monotonic(), args.seed, 0, Counter[str]()
    while time.monotonic() - began < 60 * args.minutes:
        faults, part = run(make(n) for n in range(number, number + _ROUND))
        for case, what in faults:
            print(f"case {case.number} ({case.form}): {what}", flush=True)
        number, found, decided = number + _ROUND, found + len(faults), decided + part
    print(
        f"{number - args.seed} cases, {found} faults; " + ", ".join(f"{n} {how}" for how, n in sorted(decided.items()))
    )
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
