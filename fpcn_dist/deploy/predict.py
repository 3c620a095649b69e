"""Classify photographs with a trained model, and show where it looked.

Shape legend: B images of a batch, K classes, h x w cells of the feature map.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.sizes import require_memory
from fpcn_dist.data.index.check.images import Refused, check_images
from fpcn_dist.data.index.check.salvage import SALVAGED, salvage
from fpcn_dist.data.index.folder.folders import find_files
from fpcn_dist.data.index.notices import Notice, notice_table, refusal_table
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.deploy.onnx_backbone import with_frozen_backbone
from fpcn_dist.deploy.predictions import Prediction, to_table, write_predictions
from fpcn_dist.models import Classifier
from fpcn_dist.models.classifier import object_share
from fpcn_dist.models.modes import autocast
from fpcn_dist.runs.model_folder import ModelInfo, load_model
from fpcn_dist.runs.report.overlay import draw_overlay, to_pixels
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import make_folder, replacing
from fpcn_dist.runtime.names import file_stem, printable
from fpcn_dist.runtime.terminal import Terminal


def predict(
    model_dir: Path,
    paths: Sequence[Path],
    output: Path,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    max_decoded_mib: int | None = None,
    console: Console | None = None,
) -> list[Prediction]:
    """Classify files, write predictions.json, predictions.csv and overlays/*.png to ``output``, print a table.

    Files that are no readable images are listed and left out.

    Args:
        model_dir: a run folder, or any folder of :func:`fpcn_dist.runs.model_folder.save_model`.
        paths: image files, and folders that are searched for images at any depth.
        output: folder for the results; made if missing.
        device: where to compute.
        precision: "fp32" or "bf16" (autocast).
        max_decoded_mib: ``data.max_decoded_mib``; that of a recipe by default.
        console: where to print; standard output by default.

    Raises:
        UserError: no model there, no such path, no image in a folder, or not one readable image at all.
    """
    console = console or Terminal()
    model, info = load_model(Path(model_dir), device)
    if max_decoded_mib is not None:
        require_memory(max_decoded_mib)
        info = dataclasses.replace(info, preprocessing=info.preprocessing.changed(max_decoded_mib=max_decoded_mib))
    files, refused, salvaged = _readable(find_files(paths), info)
    if refused:
        console.print(refusal_table(refused))
    if salvaged:
        console.print(notice_table(salvaged))
    if not files:
        raise UserError("images", None, f"none of {len(refused)} file(s) can be read", "give files that are images")
    overlays = Path(output) / "overlays"
    make_folder(Path(output))
    make_folder(overlays)
    model = with_frozen_backbone(model, len(files))
    found = _classify(model, info, files, overlays, torch.device(device), precision)
    total = -(-len(files) // info.preprocessing.eval_batch_size)
    predictions = [
        prediction for batch in track(found, "classify", total, console=console, transient=True) for prediction in batch
    ]
    write_predictions(Path(output), predictions)
    console.print("\n".join(to_table(predictions)), highlight=False, markup=False, soft_wrap=True)
    written = f"Wrote {printable(output)}/predictions.json, predictions.csv and {len(predictions)} overlays."
    console.print(written, highlight=False, markup=False)
    return predictions


def _readable(files: list[Path], info: ModelInfo) -> tuple[list[Path], list[Refused], list[Notice]]:
    """Files that decode, those that do not with the reason, and those that were salvaged."""
    blobs, config = Blob.of_files(files), info.preprocessing
    checks = check_images(blobs, config.max_pixels, backend=config.backend)
    salvaged: list[int] = []
    if config.on_bad_image == "salvage":
        checks, salvaged = salvage(blobs, checks, config.max_pixels)
    checked = list(zip(files, checks, strict=True))
    refused = [Refused(str(file), check.reason) for file, check in checked if check.reason is not None]
    notices = [Notice(str(files[index]), SALVAGED) for index in salvaged]
    return [file for file, check in checked if check.ok], refused, notices


def overlay_names(files: Sequence[Path]) -> list[str]:
    """A PNG name for each file: its stem, made unique with a digest of its path where several share that."""
    stems = [file_stem(file.stem) for file in files]
    count = Counter(stem.lower() for stem in stems)  # lower: some file systems ignore case
    return [
        f"{stem}.png"
        if count[stem.lower()] == 1
        else f"{stem}-{hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:12]}.png"
        for file, stem in zip(files, stems, strict=True)
    ]


def _classify(
    model: Classifier, info: ModelInfo, files: list[Path], overlays: Path, device: torch.device, precision: str
) -> Iterator[list[Prediction]]:
    """Predictions batch by batch, in the order of ``files``; the overlays of a batch are on disk when it comes."""
    count, blobs = len(files), Blob.of_files(files)
    loader = EvalLoader(
        blobs,
        np.full(count, -1),
        np.arange(count),
        info.preprocessing,
        rank=0,
        world_size=1,
        device=device,
    )
    names = overlay_names(files)

    def save_overlay(pixels: np.ndarray, mask: np.ndarray, name: str) -> None:
        with replacing(overlays / name) as temporary:
            draw_overlay(pixels, mask, side=pixels.shape[0]).save(temporary, format="PNG")

    with torch.inference_mode(), ThreadPoolExecutor() as pool:
        for batch in loader:
            with autocast(device, precision):
                region = model.pool(batch.images)
            probabilities_BK = model.logits(region.pooled).softmax(dim=1).cpu()
            shares, masks = object_share(region.mask).tolist(), region.mask.float().cpu().numpy()
            ids = batch.image_ids.tolist()
            pixels = [to_pixels(image, info.preprocessing) for image in batch.images]
            list(pool.map(save_overlay, pixels, masks, [names[index] for index in ids]))
            yield [
                Prediction(
                    file=str(files[index]),
                    predicted=info.classes[int(row.argmax())],
                    probabilities=dict(zip(info.classes, row.tolist(), strict=True)),
                    object_share=share,
                    overlay=names[index],
                )
                for index, row, share in zip(ids, probabilities_BK, shares, strict=True)
            ]
