"""A trained model as one ONNX file that knows its classes and preprocessing, in float32 and in 8-bit integers.

Nothing is written before onnxruntime has computed what PyTorch computes, on photographs of the run; and the files are
read by :mod:`fpcn_dist.deploy.onnx_predict`, which needs no PyTorch.

Shape legend: B images of a batch, C channels and h x w cells of the feature map, K classes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.header import UnreadableError
from fpcn_dist.data.decoding.photograph import examine
from fpcn_dist.data.index.folders import find_images
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.data.synthetic import generate
from fpcn_dist.deploy import onnx_predict
from fpcn_dist.deploy.onnx_graph import ExportableModel, quantise, to_onnx
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.model_folder import ModelInfo, load_model
from fpcn_dist.runs.other_images import require_same_images
from fpcn_dist.runs.report.overlay import to_pixels
from fpcn_dist.runtime.address import Address, is_url
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import replacing
from fpcn_dist.runtime.terminal import Terminal

FP32_FILE, INT8_FILE = "model.onnx", "model-int8.onnx"
_PARITY_IMAGES, _CALIBRATION_IMAGES = 16, 128
_BATCH = 8
_LOGIT_LIMIT = 1e-3
_TIE = 1e-4
# One for the two decoders, and one for the two resizers.
_GREY_LEVELS = 2
_OTHER_VERSIONS = "install the versions of constraints.txt, or use --format safetensors"


@dataclass(frozen=True)
class _Photographs:
    """Images to show to a model, with labels where they have any."""

    blobs: list[Blob]
    labels: NDArray[np.int64]
    name: str

    @classmethod
    def of(cls, manifest: Manifest, splits: Sequence[str], most: int | None = None) -> _Photographs:
        """Images of the first of ``splits`` that has any; at most ``most``, spread over all classes."""
        split = next(split for split in splits if len(manifest.ids(split)))
        ids = manifest.ids(split)
        if most is not None and len(ids) > most:
            ids = ids[np.linspace(0, len(ids) - 1, most).round().astype(int)]
        return cls([manifest.blob(image_id) for image_id in ids.tolist()], manifest.labels[ids], f"{split} images")

    def batches(self, info: ModelInfo) -> Iterator[Batch]:
        config = info.preprocessing.changed(eval_batch_size=_BATCH)
        ids = np.arange(len(self.blobs))
        device = torch.device("cpu")
        return iter(EvalLoader(self.blobs, self.labels, ids, config, rank=0, world_size=1, device=device))


def export_onnx(
    run_dir: Path,
    *,
    int8: bool = False,
    output: Path | None = None,
    data: Address | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Write model.onnx, and model-int8.onnx if asked for; print parity, sizes and accuracies.

    Args:
        run_dir: a run folder, or (not with ``int8``) any folder of :func:`fpcn_dist.runs.model_folder.save_model`.
        int8: also quantise the backbone to 8-bit integers, calibrated on training images.
        output: folder to write; the run folder by default.
        data: the image folder, where it is no longer where it was during training.
        console: where to print; standard output by default.

    Returns:
        The files that were written.

    Raises:
        UserError: no model in the folder, one that cannot be exported, photographs that are missing but needed, or
            results that differ from PyTorch's; nothing is written then.
    """
    console = console or Terminal()
    run_dir, output = Path(run_dir), Path(output or run_dir)
    model, info = load_model(run_dir)
    exportable = ExportableModel(model)
    manifest = _manifest(run_dir, data, needed=int8)
    proto, head = to_onnx(exportable, info)
    with tempfile.TemporaryDirectory() as folder:
        if manifest is None:
            generate(Path(folder), images_per_class=6)
            files = list(find_images(Path(folder)))[:_PARITY_IMAGES]
            console.print(f"The photographs of {run_dir} are not at hand: generated images take their place.")
            photographs = _Photographs(Blob.of_files(files), np.full(len(files), -1), "generated images")
        else:
            photographs = _Photographs.of(manifest, ("val", "test", "train"), _PARITY_IMAGES)
        _check_parity(exportable, _open(proto, info, output), info, photographs, run_dir, console)
    _make_folder(output)
    written = [_save(proto, output / FP32_FILE)]
    if int8 and manifest is not None:
        calibration = _Photographs.of(manifest, ["train"], _CALIBRATION_IMAGES)
        images = (batch.images.numpy() for batch in calibration.batches(info))
        quantised = quantise(proto, info, head, images)
        written.append(_save(quantised, output / INT8_FILE))
        console.print(f"Calibrated on {len(calibration.blobs)} {calibration.name}.")
        console.print(_compare(written, info, _Photographs.of(manifest, ("test", "val", "train"))))
    for path in written:
        console.print(f"Wrote {path} ({_megabytes(path)}).")
    return written


def _missing(manifest: Manifest) -> str | None:
    """The path of an image that is not there; of a remote folder, only the first one is looked at."""
    if is_url(manifest.root):
        try:
            manifest.blob(0).read()
        except (OSError, UserError):
            return manifest.images[0].path
        return None
    files = {manifest.blob(index).path: image.path for index, image in enumerate(manifest.images)}
    return next((path for file, path in files.items() if not Path(file).is_file()), None)


def _manifest(run_dir: Path, data: Address | None, *, needed: bool) -> Manifest | None:
    """The manifest of a run whose photographs are all there, else ``None`` where they are not needed."""
    run = RunFolder(run_dir)
    if not (run.recipe.is_file() and run.manifest.is_file()):
        if needed or data is not None:
            field, value = ("--data", data) if data is not None else ("--int8", None)
            reason = f"{run_dir} is no run folder, so it is not known which images it was trained on"
            raise UserError(field, value, reason, "give the run folder of train.py, or leave the option out")
        return None
    _, manifest = run.open()
    if data is not None:
        manifest = dataclasses.replace(manifest, root=str(data.resolve()))
    missing = _missing(manifest)
    if missing is None:
        if data is not None:
            ids = range(len(manifest.images))
            require_same_images(manifest, ids, "images", "restore them, or name the folder where they are now")
        return manifest
    if needed or data is not None:
        reason = f"the photographs of {run_dir} are not there ({missing} is missing)"
        raise UserError("--data", manifest.root, reason, "restore them, or name the folder where they are now")
    return None


def _open(proto: onnx.ModelProto, info: ModelInfo, output: Path) -> onnx_predict.OnnxModel:
    """The model in onnxruntime, from memory."""
    try:
        session = onnx_predict.open_session(proto.SerializeToString())
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        reason = f"onnxruntime cannot run it ({' '.join(str(error).split())[:200]})"
        raise UserError("model.backbone", info.model.backbone, reason, _OTHER_VERSIONS) from error
    return onnx_predict.describe(session, output / FP32_FILE)


def _check_parity(
    exportable: ExportableModel,
    exported: onnx_predict.OnnxModel,
    info: ModelInfo,
    photographs: _Photographs,
    run_dir: Path,
    console: Console,
) -> None:
    """Print how far onnxruntime is from PyTorch, and the preprocessing without PyTorch from that of evaluation.

    Raises:
        UserError: too far.
    """
    found, expected, from_files, levels, ties, furthest = [], [], [], 0, 0, photographs.blobs[0]
    for batch in photographs.batches(info):
        logits, mask = map(torch.from_numpy, exported.run(batch.images.numpy()))
        reference, undecided = _reference(exportable, batch.images, mask, run_dir)
        ties += undecided
        blobs = [photographs.blobs[index] for index in batch.image_ids.tolist()]
        pixels = [_read(exported, blob) for blob in blobs]
        for blob, image, own in zip(blobs, batch.images, pixels, strict=True):
            apart = int(np.abs(to_pixels(image, info.preprocessing).astype(int) - own.astype(int)).max())
            levels, furthest = max((levels, furthest), (apart, blob), key=lambda pair: pair[0])
        found.append(logits)
        expected.append(reference)
        from_files.append(torch.from_numpy(exported.run(exported.normalise(pixels))[0]))
    logits_BK, expected_BK, from_files_BK = map(torch.cat, (found, expected, from_files))
    difference, largest = (logits_BK - expected_BK).abs().max().item(), expected_BK.abs().max().item()
    own_class = expected_BK.gather(1, logits_BK.argmax(dim=1, keepdim=True))[:, 0]
    others = int((expected_BK.amax(dim=1) - own_class > _TIE * largest).sum())
    same = int((from_files_BK.argmax(dim=1) == expected_BK.argmax(dim=1)).sum())
    count = len(expected_BK)
    console.print(
        f"Parity on {count} {photographs.name}: logits differ by at most {difference:.1e}, the largest is {largest:.3g}"
        + (f"; {ties} cells at the region's threshold were decided by rounding" if ties else "")
        + f".\nPreprocessing without PyTorch: pixels differ by at most {levels} of 255 grey levels, "
        f"same class for {same} of {count} images.",
        highlight=False,
    )
    if not difference <= _LOGIT_LIMIT * largest or others:
        reason = f"onnxruntime and PyTorch disagree: logits differ by {difference:.1e} of {largest:.3g}"
        reason += f", and {others} of {count} images get another class" if others else ""
        raise UserError("model", run_dir, reason, _OTHER_VERSIONS)
    if levels > _GREY_LEVELS:
        header = examine(furthest.read(), info.preprocessing.max_pixels, salvage=True)
        reason = f"of {header.form} with {header.mode}, Pillow and training's decoder make images that differ by "
        raise UserError("image", furthest, f"{reason}{levels} grey levels", "convert it to PNG of 8 bits a channel")


def _read(exported: onnx_predict.OnnxModel, blob: Blob) -> NDArray[np.uint8]:
    try:
        return exported.read(blob)
    except UnreadableError as error:
        raise UserError("image", blob, f"Pillow cannot read what training could: {error}", "convert it") from None


def _reference(exportable: ExportableModel, images: Tensor, mask_Bhw: Tensor, run_dir: Path) -> tuple[Tensor, int]:
    """PyTorch's logits [B, K], and the number of cells where only rounding decided whether they are in the region.

    Such a cell makes a step in the logits, whichever way it falls: these images are compared over the same region.

    Raises:
        UserError: ``mask_Bhw``, onnxruntime's, differs from PyTorch's by more than rounding.
    """
    with torch.inference_mode():
        pool = exportable.model.pool(images)
        logits_BK, other_Bhw = exportable.model.logits(pool.pooled), mask_Bhw != pool.mask
        if not other_Bhw.any():
            return logits_BK, 0
        features_BChw = exportable.model.backbone(images)
        rounding_B = _TIE * features_BChw.abs().sum(dim=1).amax(dim=(1, 2))
        clear_Bhw = exportable.excess(features_BChw).abs() > rounding_B[:, None, None]
        if not exportable.masked or (other_Bhw & clear_Bhw).any():
            reason = "onnxruntime and PyTorch disagree about the region"
            raise UserError("model", run_dir, reason, _OTHER_VERSIONS)
        other_B1 = other_Bhw.flatten(1).any(dim=1, keepdim=True)
        return torch.where(other_B1, exportable.logits(features_BChw, mask_Bhw), logits_BK), int(other_Bhw.sum())


def _compare(paths: Sequence[Path], info: ModelInfo, photographs: _Photographs) -> Table:
    """Size and accuracy of each file."""
    models = [onnx_predict.open_model(path) for path in paths]
    correct = np.zeros(len(models), dtype=int)
    for batch in photographs.batches(info):
        predicted = np.stack([model.run(batch.images.numpy())[0].argmax(axis=1) for model in models])
        correct += (predicted == batch.labels.numpy()).sum(axis=1)
    count = len(photographs.blobs)
    table = Table("model", "size", f"accuracy on {count} {photographs.name}")
    for path, hits in zip(paths, correct.tolist(), strict=True):
        table.add_row(path.name, _megabytes(path), f"{100 * hits / count:.1f} %")
    return table


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--output", output, str(error.strerror).lower(), "choose another folder") from None


def _save(proto: onnx.ModelProto, path: Path) -> Path:
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return path


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
