"""Classify photographs with an exported ONNX model on a machine without PyTorch or GPU, such as a field laptop.

Needs onnxruntime, numpy and pillow only: ``pip install onnxruntime numpy pillow`` and ``pip install --no-deps .``. The
model carries its class names and its preprocessing (:class:`OnnxModel`), so the file is all there is to copy.

Shape legend: B images of a batch, K classes, h x w cells of the feature map.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.formats.header import UnreadableError
from fpcn_dist.data.decoding.photograph import decode, examine
from fpcn_dist.data.decoding.sizes import cut, require_memory
from fpcn_dist.data.index.folder.folders import find_files
from fpcn_dist.deploy.predictions import Prediction, to_table, write_predictions
from fpcn_dist.runtime.cores import usable_cores
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder
from fpcn_dist.runtime.limits import MIB
from fpcn_dist.runtime.names import is_utf8, printable

FORMAT = 2
"""Number of the layout of inputs, outputs and metadata; it changes when an old reader would misread a new model. Format
1 knew no interpolation but the bilinear one."""
INPUT, LOGITS, MASK = "image", "logits", "mask"
"""Input [B, 3, crop, crop] float32, normalised; outputs [B, K], and [B, h, w], which is 1 inside the region."""
MAX_DECODED_MIB = 512
"""MiB of decoded images that are held at once, unless one is larger by itself."""
MAX_PIXELS = 100_000_000
"""Bound of models that were exported before they knew that of their training."""
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_BATCH = 8
_EXPORT = "export one with launch/export.py RUN --format onnx"


@dataclass(frozen=True)
class OnnxModel:
    """An exported model, ready to run on the CPU.

    Attributes:
        session: computes logits and mask.
        classes: class names in label order.
        resize: side in pixels that images are resized to.
        crop: side in pixels of the central crop that the network sees.
        mean, std: of red, green and blue, for pixels in [0, 1].
        interpolation: filter of the resizing, one of :data:`INTERPOLATIONS`.
        fit: "squeeze" (to a square), "pad" (to a square that the long side fills) or "short_side".
        on_bad_image: where "salvage", JPEGs that were cut short are shown.
        task: "contrast" (FPCN) or "classify" (the plain classifier).
        max_pixels: images with more pixels than this in their header are refused before anything is decoded.
    """

    session: onnxruntime.InferenceSession
    classes: tuple[str, ...]
    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    fit: str
    on_bad_image: str
    task: str
    max_pixels: int = MAX_PIXELS

    def run(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Normalised images [B, 3, crop, crop] to logits [B, K] and mask [B, h, w]."""
        logits, mask = self.session.run([LOGITS, MASK], {INPUT: images})
        return np.asarray(logits), np.asarray(mask)

    def read(self, blob: Blob) -> NDArray[np.uint8]:
        """Grey levels [crop, crop, 3] of an image, cut as the network expects; see :func:`read_image`."""
        salvage = self.on_bad_image == "salvage"
        return read_image(blob, self.resize, self.crop, self.fit, self.interpolation, self.max_pixels, salvage=salvage)

    def normalise(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """B images [crop, crop, 3] of grey levels to the network's input [B, 3, crop, crop]."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        images = (np.stack(pixels) / np.float32(255) - mean) / std
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)


def open_session(model: str | bytes, *, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A session on the CPU, from a path or from the bytes of a model, that prints nothing but errors.

    ``threads`` are as many as the machine has cores unless given; then they leave the cores to others between batches.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def open_model(path: Path) -> OnnxModel:
    """Load a model that launch/export.py wrote.

    Raises:
        UserError: no such file, not an ONNX file, or one that was not written by fpcn_dist or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("model", path, "is a folder" if path.is_dir() else "there is no such file", "give a model.onnx")
    try:
        # onnxruntime takes no path that is not UTF-8.
        session = open_session(str(path) if is_utf8(path) else path.read_bytes())
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        detail = " ".join(str(error).split())[:200]
        raise UserError("model", path, f"is not an ONNX file that onnxruntime can load ({detail})", _EXPORT) from None
    return describe(session, path)


def describe(session: onnxruntime.InferenceSession, path: Path) -> OnnxModel:
    """The model of ``session`` with what its metadata say; ``path`` names it in errors.

    Raises:
        UserError: the metadata are missing, of another format, or damaged.
    """
    metadata = session.get_modelmeta().custom_metadata_map
    version = metadata.get("fpcn_dist_version")
    if version is None:
        reason = "was not written by fpcn_dist: it holds neither class names nor preprocessing"
        raise UserError("model", path, reason, _EXPORT)
    if metadata.get("format") not in ("1", str(FORMAT)):
        reason = f"has format {metadata.get('format')} (fpcn_dist {version}), not {FORMAT}"
        raise UserError("model", path, reason, f"install fpcn_dist {version}, or export the model again")
    try:
        model = OnnxModel(
            session,
            tuple(str(name) for name in json.loads(metadata["classes"])),
            int(metadata["resize"]),
            int(metadata["crop"]),
            _three(metadata["mean"]),
            _three(metadata["std"]),
            metadata.get("interpolation", "bilinear"),
            metadata.get("fit", "squeeze"),  # as before there was a choice
            metadata.get("on_bad_image", "skip"),
            metadata["task"],
            int(metadata.get("max_pixels", MAX_PIXELS)),
        )
        _check(model)
    except (KeyError, TypeError, ValueError) as error:
        detail = f"{type(error).__name__} {error}"
        raise UserError("model", path, f"is damaged ({detail})", "export the model again") from None
    return model


def _three(text: str) -> tuple[float, ...]:
    values = tuple(float(value) for value in json.loads(text))
    if len(values) != 3:
        raise ValueError(f"{len(values)} values for red, green and blue")
    return values


def _check(model: OnnxModel) -> None:
    shapes = {node.name: node.shape for node in (*model.session.get_inputs(), *model.session.get_outputs())}
    if model.fit not in ("squeeze", "pad", "short_side"):
        raise ValueError(f"unknown fit {model.fit!r}")
    if not 0 < model.crop <= model.resize or shapes[INPUT][1:] != [3, model.crop, model.crop]:
        raise ValueError(f"resize {model.resize} and crop {model.crop} do not fit the input {shapes[INPUT]}")
    if model.interpolation not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {model.interpolation}")
    if shapes[LOGITS][1] != len(model.classes) or len(shapes[MASK]) != 3:
        raise ValueError(f"{len(model.classes)} class names do not fit the output {shapes[LOGITS]}")


def read_image(
    blob: Blob,
    resize: int,
    crop: int,
    fit: str,
    interpolation: str,
    max_pixels: int = MAX_PIXELS,
    *,
    salvage: bool = False,
) -> NDArray[np.uint8]:
    """Grey levels [crop, crop, 3] of the central crop, upright, as :mod:`fpcn_dist.data.decoding` cuts it.

    Raises:
        UnreadableError: the image is not shown; says why.
    """
    try:
        data = blob.read()
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror})") from None
    image = Image.fromarray(decode(examine(data, max_pixels, salvage=salvage)))
    framed = _fit(image, resize, fit, INTERPOLATIONS[interpolation])
    left, top = (round((side - crop) / 2) for side in framed.size)
    return np.asarray(framed.crop((left, top, left + crop, top + crop)))


def _fit(image: Image.Image, resize: int, fit: str, kernel: Image.Resampling) -> Image.Image:
    """The image in the frame that its crop is cut from: :mod:`fpcn_dist.data.resizing`."""
    short, long = min(image.size), max(image.size)
    if fit == "squeeze":
        return image.resize((resize, resize), kernel)
    if fit == "short_side":
        width, height = (resize * side // short for side in image.size)
        return image.resize((width, height), kernel)
    width, height = (max(1, round(resize * side / long)) for side in image.size)
    frame = Image.new("RGB", (resize, resize))
    frame.paste(image.resize((width, height), kernel), ((resize - width) // 2, (resize - height) // 2))
    return frame


def classify(
    model: OnnxModel, files: Sequence[Path], max_decoded_mib: int = MAX_DECODED_MIB
) -> tuple[list[Prediction], list[tuple[Path, str]]]:
    """Predictions for the files that are images, in order, and the other files with the reason.

    As many images are decoded at once as there are cores and as fit into ``max_decoded_mib``; one at least.
    """
    predictions, refused = [], []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for first in range(0, len(files), _BATCH):
            some = files[first : first + _BATCH]
            parts = cut(Blob.of_files(some), max_decoded_mib * MIB)
            read = [one for part in parts for one in pool.map(functools.partial(_try_to_read, model), some[part])]
            batch = [(file, pixels) for file, pixels in zip(some, read, strict=True) if not isinstance(pixels, str)]
            refused += [(file, reason) for file, reason in zip(some, read, strict=True) if isinstance(reason, str)]
            predictions += _classify_batch(model, batch) if batch else []
    return predictions, refused


def _try_to_read(model: OnnxModel, file: Path) -> NDArray[np.uint8] | str:
    """Grey levels [crop, crop, 3], or why there are none."""
    try:
        return model.read(Blob(str(file)))
    except UnreadableError as error:
        return str(error)


def _classify_batch(model: OnnxModel, batch: Sequence[tuple[Path, NDArray[np.uint8]]]) -> list[Prediction]:
    logits_BK, mask_Bhw = model.run(model.normalise([pixels for _, pixels in batch]))
    odds_BK = np.exp(logits_BK.astype(np.float64) - logits_BK.max(axis=1, keepdims=True))
    probabilities_BK = odds_BK / odds_BK.sum(axis=1, keepdims=True)
    shares_B = (mask_Bhw == 1).mean(axis=(1, 2))
    return [
        Prediction(
            file=str(file),
            predicted=model.classes[int(row.argmax())],
            probabilities=dict(zip(model.classes, row.tolist(), strict=True)),
            object_share=share,
        )
        for (file, _), row, share in zip(batch, probabilities_BK, shares_B.tolist(), strict=True)
    ]


def predict(
    model_file: Path, paths: Sequence[Path], output: Path, *, max_decoded_mib: int = MAX_DECODED_MIB
) -> list[Prediction]:
    """Classify files, write predictions.json and predictions.csv to ``output``, print a table.

    Files that are no readable images are listed and left out.

    Args:
        model_file: a model that launch/export.py wrote.
        paths: image files, and folders that are searched for images at any depth.
        output: folder for the results; made if missing.
        max_decoded_mib: MiB of decoded images that are held at once, unless one is larger by itself.

    Raises:
        UserError: no model there, no such path, no image in a folder, not one readable image at all, or a folder that
            cannot be written to.
    """
    require_memory(max_decoded_mib)
    model = open_model(model_file)
    predictions, refused = classify(model, find_files(paths), max_decoded_mib)
    for file, reason in refused:
        print(f"refused: {printable(file)}: {printable(reason)}")
    if not predictions:
        raise UserError("images", None, f"none of {len(refused)} file(s) can be read", "give files that are images")
    output = Path(output)
    make_folder(output)
    write_predictions(output, predictions)
    print("\n".join(to_table(predictions)))
    print(f"Wrote {printable(output)}/predictions.json and predictions.csv.")
    return predictions


def main(argv: Sequence[str]) -> int:
    """The command ``predict.py MODEL.onnx IMAGE...``; returns its exit status: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description="Classify images: prints a table, writes predictions.json and predictions.csv."
    )
    parser.add_argument("model", type=Path, help="ONNX model of export.py")
    parser.add_argument("images", type=Path, nargs="+", help="image files, and folders to search for them")
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--max-decoded-mib",
        type=int,
        default=MAX_DECODED_MIB,
        help="MiB of decoded images to hold at once, unless one is larger by itself (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        predict(args.model, args.images, args.output, max_decoded_mib=args.max_decoded_mib)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
