"""All that touches NVIDIA DALI and nvImageCodec, its decoder: one pipeline for training, evaluation and prediction.

    path --read--> bytes --decode--> RGB uint8 HWC --resize, crop--> [crop, crop] uint8 --flip, normalise--> float32 CHW

The image is resized to ``resize`` x ``resize`` with an antialiased triangle filter and cut to ``crop`` x ``crop`` in
one go: only the part of the source that the crop shows is resampled. EXIF orientation is applied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What nvImageCodec would print for a bad file, we report with its path.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec  # noqa: E402
from nvidia.dali import Pipeline, fn, types  # noqa: E402

from fpcn_dist.config import DataConfig  # noqa: E402

DECODER_VERSION: str = nvimgcodec.__version__
MEAN = (0.485, 0.456, 0.406)
"""ImageNet mean of red, green and blue, for pixels in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""ImageNet standard deviation of red, green and blue, for pixels in [0, 1]."""


class Request(NamedTuple):
    """What the pipeline needs to make one batch.

    Attributes:
        paths: B files.
        crops: [B, 3] crop row, crop column and flip, as in :class:`fpcn_dist.data.batch.Batch`.
    """

    paths: list[str]
    crops: NDArray[np.int64]


class Decoding:
    """A running pipeline: turns requests into images, two batches ahead of whoever takes them.

    Args:
        requests: what to decode; asked from the calling thread, before the batch is needed.
        config: sizes.
        device: where the images end up, and on CUDA where they are decoded.
        batch_size: images of the largest request.
        threads: CPU threads.
    """

    def __init__(
        self, requests: Iterator[Request], config: DataConfig, device: torch.device, batch_size: int, threads: int
    ) -> None:
        self._device = device
        self._pipeline = _build(lambda: _encode(next(requests), config), config, device, batch_size, threads)

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


def _encode(request: Request, config: DataConfig) -> tuple[list[NDArray[np.uint8]], Any, Any, Any]:
    """A request in the form that the pipeline reads: path bytes, relative region of interest, flip."""
    paths = [np.frombuffer(os.fsencode(path), dtype=np.uint8) for path in request.paths]
    corner = request.crops[:, :2]
    start = (corner / config.resize).astype(np.float32)
    end = ((corner + config.crop) / config.resize).astype(np.float32)
    return paths, start, end, request.crops[:, 2].astype(np.int32)


def _build(
    source: Callable[[], Any], config: DataConfig, device: torch.device, batch_size: int, threads: int
) -> Pipeline:
    cuda = device.type == "cuda"
    device_id = (device.index or 0) if cuda else None
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=2)
    with pipeline:
        path, start, end, flip = fn.external_source(source=source, num_outputs=4, batch=True)
        # A file that is cut short while it is mapped into memory would kill the process, so read it.
        encoded = fn.io.file.read(path, dont_use_mmap=True)
        # Fancy upsampling is what the CPU decoder does to chroma; asked for, the GPU gives the same image.
        decoded = fn.decoders.image(
            encoded, device="mixed" if cuda else "cpu", output_type=types.RGB, jpeg_fancy_upsampling=True
        )
        resized = fn.resize(
            decoded, size=(config.crop, config.crop), roi_start=start, roi_end=end, roi_relative=True, antialias=True
        )
        images = fn.crop_mirror_normalize(
            resized,
            mirror=flip,
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


class Decoder:
    """The pipeline's decoder on the CPU, one image at a time; one instance per thread."""

    def __init__(self) -> None:
        cpu = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
        backends = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
        self._decoder = nvimgcodec.Decoder(device_id=cpu, max_num_cpu_threads=1, backends=backends)

    def fault(self, data: bytes, max_pixels: int) -> str | None:
        """Why an image file cannot be decoded, or ``None`` where it can.

        The number of pixels is read from the header, and nothing is decoded where it exceeds ``max_pixels``.
        """
        if not data:
            return "the file is empty"
        try:
            stream = nvimgcodec.CodeStream(data)
        except RuntimeError:
            return "not a JPEG, PNG, WebP, BMP or TIFF image, or its header is damaged"
        pixels = stream.height * stream.width
        if pixels > max_pixels:
            size = f"{stream.width} x {stream.height} = {pixels:,} pixels"
            return f"its header announces {size}, more than data.max_pixels {max_pixels:,}"
        return None if self._decoder.decode([stream])[0] is not None else "the image data are truncated or damaged"
