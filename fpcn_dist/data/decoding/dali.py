"""All that touches NVIDIA DALI and nvImageCodec, its decoder: one pipeline for training, evaluation and prediction.

    file --read--> bytes --decode--> RGB uint8 HWC --view--> [crop, crop] uint8 --normalise--> float32 CHW

EXIF orientation is applied. On the CPU the view is made by PyTorch inside DALI's pipeline: the same antialiased
filter, vectorised for uint8, in a fraction of the time that DALI's takes. On a GPU all steps are DALI's where views
are crops of the squeezed image, at most mirrored; others are made by the same function in PyTorch, on the GPU, from
what DALI has decoded. The resizing of the two differs by at most one grey level, save in the outermost pixels of the
whole resized image, beyond which DALI repeats the last pixel of the source where PyTorch and Pillow see none; and
where the cubic filter overshoots black or white, which PyTorch and Pillow clip after each of their two passes and
DALI once: by up to ten, in a pixel of 2,000.
"""
# DALI and nvImageCodec make their operators and types at import, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What nvImageCodec would print for a bad file, we report with its path.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from fpcn_dist.data.augmentation import view_pixels
from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.normalisation import Normalisation
from fpcn_dist.data.views import VIEW, Views
from fpcn_dist.recipe.preprocessing import Preprocessing
from fpcn_dist.recipe.schema import DataConfig

VERSION: str = nvimgcodec.__version__
_NO_IMAGE = b"unreadable"
_INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class Decoding:
    """A running pipeline: turns requests into images, ahead of whoever takes them.

    Args:
        requests: what to decode; asked from the calling thread, before the batch is needed.
        config: sizes and preprocessing.
        device: where the images end up, and on CUDA where they are decoded.
        batch_size: images of the largest request.
        threads: CPU threads.
    """

    def __init__(
        self, requests: Iterator[BatchRequest], config: DataConfig, device: torch.device, batch_size: int, threads: int
    ) -> None:
        self._config, self._device = config, device
        self._pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=(device.index or 0) if device.type == "cuda" else None,
            prefetch_queue_depth=BATCHES_IN_FLIGHT,
        )
        self._afterwards = Afterwards(config, device) if device.type == "cuda" and not is_plain(config) else None
        with self._pipeline:
            self._pipeline.set_outputs(self._images(requests, threads))
        self._pipeline.build()

    def _images(self, requests: Iterator[BatchRequest], threads: int) -> DataNode:
        if self._afterwards is not None:
            return decoded_by_dali(self._afterwards.note(requests), "mixed", threads)
        if self._device.type == "cuda":
            return plain_views_by_dali(requests, self._config, "mixed", threads)
        return views_by_torch(requests, self._config, threads)

    def next(self) -> Tensor:
        """The images of the next request, [B, 3, crop, crop] float32, owned by the caller.

        Raises:
            StopIteration: there are no more requests.
            RuntimeError: a file of the batch cannot be read or decoded; the pipeline is then of no further use.
        """
        # Handing DALI the stream that will read the images ties their memory to it: no wait, no copy, no early reuse.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (images,) = self._pipeline.run(stream)
        return torch.from_dlpack(images.as_tensor()) if self._afterwards is None else self._afterwards(images)

    def close(self) -> None:
        """Stop the pipeline and free its buffers."""
        del self._pipeline


def is_plain(config: DataConfig) -> bool:
    """Whether views are crops of the squeezed image, at most mirrored."""
    return config.fit == "squeeze" and not config.augment.changes_views


class Afterwards:
    """Makes views of what the pipeline has decoded, on the device.

    Args:
        config: sizes.
        device: where the decoded images are.
    """

    def __init__(self, config: DataConfig, device: torch.device) -> None:
        self._config, self._normalised = config, Normalisation(config.preprocessing, device)
        self._views: deque[Views] = deque()

    def note(self, requests: Iterator[BatchRequest]) -> Iterator[BatchRequest]:
        """The same requests, whose views are kept until their images come."""
        for request in requests:
            self._views.append(request.views)
            yield request

    def __call__(self, images: Any) -> Tensor:
        """The views [B, 3, crop, crop] float32 of a list of uint8 HWC images of any sizes."""
        views = self._views.popleft()
        pixels = [view_pixels(torch.from_dlpack(images[index]), view, self._config) for index, view in enumerate(views)]
        return self._normalised(torch.stack(pixels))


class _Read(NamedTuple):
    """A request whose bytes are at hand."""

    encoded: list[NDArray[np.uint8]]
    views: Views


def _read_ahead(requests: Iterator[BatchRequest], threads: int) -> Iterator[_Read]:
    """Requests with their bytes, which threads read while the batches before them are decoded and used."""
    ahead: deque[tuple[list[Future[NDArray[np.uint8]]], Views]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="reading")
    try:
        for request in itertools.chain(requests, [None] * BATCHES_IN_FLIGHT):
            if request is not None:
                ahead.append(([pool.submit(_read, blob) for blob in request.blobs], request.views))
            if ahead and (request is None or len(ahead) > BATCHES_IN_FLIGHT):
                parts, views = ahead.popleft()
                yield _Read([part.result() for part in parts], views)
    finally:
        # An abandoned pipeline is collected at any time, in a thread that is just being started, too, where to wait
        # for another thread is to wait for ever.
        pool.shutdown(wait=False, cancel_futures=True)


def _read(blob: Blob) -> NDArray[np.uint8]:
    """Its bytes; of what cannot be read, bytes that no decoder takes, so that it fails with its own batch."""
    try:
        return np.frombuffer(blob.read() or _NO_IMAGE, dtype=np.uint8)
    except OSError:
        return np.frombuffer(_NO_IMAGE, dtype=np.uint8)


def _decode(encoded: DataNode, device: str) -> DataNode:
    # Fancy upsampling is what the CPU decoder does to chroma; asked for, the GPU gives the same image.
    return fn.decoders.image(encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True)


def _normalise(pixels: DataNode, shown: Preprocessing, flip: DataNode | int = 0) -> DataNode:
    return fn.crop_mirror_normalize(
        pixels,
        mirror=flip,
        mean=[255 * value for value in shown.mean],
        std=[255 * value for value in shown.std],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def decoded_by_dali(requests: Iterator[BatchRequest], device: str, threads: int) -> DataNode:
    """The images as their files have them: uint8 HWC of any sizes; ``device`` is "mixed" (to a GPU) or "cpu"."""
    read = _read_ahead(requests, threads)
    return _decode(fn.external_source(source=lambda: next(read).encoded, batch=True), device)


def plain_views_by_dali(requests: Iterator[BatchRequest], config: DataConfig, device: str, threads: int) -> DataNode:
    """Crops of the squeezed images, mirrored where their views say so, by DALI alone: float32 CHW, normalised."""
    read = _read_ahead(requests, threads)

    def source() -> tuple[list[NDArray[np.uint8]], NDArray[np.int32], NDArray[np.int32]]:
        (encoded, views), room = next(read), config.resize - config.crop
        corners = np.stack([views["down"], views["right"]], axis=1) * room
        return encoded, corners.round().astype(np.int32), views["flip"].astype(np.int32)

    encoded, corner, flip = fn.external_source(source=source, num_outputs=3, batch=True)
    return _normalise(resize_by_dali(_decode(encoded, device), corner, config), config.preprocessing, flip)


def views_by_torch(requests: Iterator[BatchRequest], config: DataConfig, threads: int) -> DataNode:
    """Views of any kind, made by PyTorch on the CPU: float32 CHW, normalised."""
    pool, read = ThreadPoolExecutor(threads), _read_ahead(requests, threads)

    def source() -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
        encoded, views = next(read)
        return encoded, views.view(np.uint8).reshape(len(views), -1)

    def make(image: NDArray[np.uint8], view: NDArray[np.uint8]) -> NDArray[np.uint8]:
        pixels = view_pixels(torch.from_numpy(image), view.view(VIEW)[0], config)
        return np.ascontiguousarray(pixels.numpy())

    def make_batch(images: list[NDArray[np.uint8]], views: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        return list(pool.map(make, images, views))

    encoded, view = fn.external_source(source=source, num_outputs=2, batch=True)
    images = _decode(encoded, "cpu")
    made = fn.python_function(images, view, function=make_batch, batch_processing=True, output_layouts="HWC")
    return _normalise(made, config.preprocessing)


def resize_by_dali(decoded: DataNode, corner: DataNode, config: DataConfig) -> DataNode:
    """Resize uint8 HWC images and cut them at [row, column]; only what the crop shows is resampled."""
    start = fn.cast(corner, dtype=types.FLOAT)
    return fn.resize(
        decoded,
        size=(config.crop, config.crop),
        roi_start=start / config.resize,
        roi_end=(start + config.crop) / config.resize,
        roi_relative=True,
        antialias=True,
        interp_type=_INTERPOLATIONS[config.preprocessing.interpolation],
    )


class Decoder:
    """The pipeline's decoder on the CPU, one image at a time; one instance per thread."""

    def __init__(self) -> None:
        cpu = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
        backends = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
        self._decoder = nvimgcodec.Decoder(device_id=cpu, max_num_cpu_threads=1, backends=backends)

    def size(self, data: bytes) -> tuple[int, int] | None:
        """Width and height that the header of an image file announces; ``None`` where it is no image."""
        try:
            stream = nvimgcodec.CodeStream(data)
            return stream.width, stream.height
        except RuntimeError:
            return None

    def decodes(self, data: bytes) -> bool:
        """Whether the pixels of an image file are all there."""
        return self._decoder.decode([nvimgcodec.CodeStream(data)])[0] is not None
