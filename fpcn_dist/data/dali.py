"""All that touches NVIDIA DALI and nvImageCodec, its decoder: one pipeline for training, evaluation and prediction.

    path --read--> bytes --decode--> RGB uint8 HWC --resize, crop--> [crop, crop] uint8 --flip, normalise--> float32 CHW

The image is resized to ``resize`` x ``resize``, without keeping its aspect ratio, by the antialiased filter of
``interpolation``, and cut to ``crop`` x ``crop``. EXIF orientation is applied. On a GPU all steps are DALI's. On the
CPU the resizing is PyTorch's inside DALI's pipeline: the same filter, vectorised for uint8, in a fraction of the time
that DALI's takes.
The two differ by at most one grey level, save in the outermost pixels of the whole resized image, beyond which DALI
repeats the last pixel of the source where PyTorch and Pillow see none; and where the cubic filter overshoots black or
white, which PyTorch and Pillow clip after each of their two passes and DALI once: by up to ten, in a pixel of 2,000.
"""
# DALI and nvImageCodec make their operators and types at import, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What nvImageCodec would print for a bad file, we report with its path.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, BatchRequest
from fpcn_dist.data.resizing import resized_crop
from fpcn_dist.recipe.schema import DataConfig

VERSION: str = nvimgcodec.__version__
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
        self._device = device
        self._pipeline = _build(lambda: _encode(next(requests)), config, device, batch_size, threads)

    def next(self) -> Tensor:
        """The images of the next request, [B, 3, crop, crop] float32, owned by the caller.

        Raises:
            StopIteration: there are no more requests.
            RuntimeError: a file of the batch cannot be read or decoded; the pipeline is then of no further use.
        """
        # Handing DALI the stream that will read the images ties their memory to it: no wait, no copy, no early reuse.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (images,) = self._pipeline.run(stream)
        return torch.from_dlpack(images.as_tensor())

    def close(self) -> None:
        """Stop the pipeline and free its buffers."""
        del self._pipeline


def _encode(request: BatchRequest) -> tuple[list[NDArray[np.uint8]], NDArray[np.int32], NDArray[np.int32]]:
    """A request in the form that the pipeline reads: path bytes, crop corner, flip."""
    paths = [np.frombuffer(os.fsencode(path), dtype=np.uint8) for path in request.paths]
    return paths, request.crops[:, :2].astype(np.int32), request.crops[:, 2].astype(np.int32)


def _build(
    source: Callable[[], Any], config: DataConfig, device: torch.device, batch_size: int, threads: int
) -> Pipeline:
    cuda = device.type == "cuda"
    device_id = (device.index or 0) if cuda else None
    pipeline = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=BATCHES_IN_FLIGHT
    )
    with pipeline:
        path, corner, flip = fn.external_source(source=source, num_outputs=3, batch=True)
        # A file that is cut short while it is mapped into memory would kill the process, so read it.
        encoded = fn.io.file.read(path, dont_use_mmap=True)
        # Fancy upsampling is what the CPU decoder does to chroma; asked for, the GPU gives the same image.
        decoded = fn.decoders.image(
            encoded, device="mixed" if cuda else "cpu", output_type=types.RGB, jpeg_fancy_upsampling=True
        )
        cropped = resize_by_dali(decoded, corner, config) if cuda else resize_by_torch(decoded, corner, config, threads)
        images = fn.crop_mirror_normalize(
            cropped,
            mirror=flip,
            mean=[255 * value for value in config.preprocessing.mean],
            std=[255 * value for value in config.preprocessing.std],
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


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


def resize_by_torch(decoded: DataNode, corner: DataNode, config: DataConfig, threads: int) -> DataNode:
    """Resize uint8 HWC images on the CPU and cut them at [row, column]."""
    pool = ThreadPoolExecutor(threads)

    def resize(image: NDArray[np.uint8], corner: NDArray[np.int32]) -> NDArray[np.uint8]:
        row, column = corner.tolist()
        return np.ascontiguousarray(resized_crop(torch.from_numpy(image), row, column, config).numpy())

    def resize_batch(images: list[NDArray[np.uint8]], corners: list[NDArray[np.int32]]) -> list[NDArray[np.uint8]]:
        return list(pool.map(resize, images, corners))

    return fn.python_function(decoded, corner, function=resize_batch, batch_processing=True, output_layouts="HWC")


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
