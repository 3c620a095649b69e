"""Decoding without DALI: torchvision and Pillow in a pool of threads, on any machine that PyTorch runs on.

    path --read, decode, turn--> RGB uint8 HWC --view--> uint8 --to the device--> --normalise--> float32 CHW

The images are those of :mod:`fpcn_dist.data.decoding.dali` on the CPU, bit for bit. torchvision decodes plain JPEGs
alone, faster than Pillow does; all else is :mod:`fpcn_dist.data.decoding.photograph`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from fpcn_dist.data.augmentation import view_pixels
from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding import photograph
from fpcn_dist.data.decoding.formats.exif import upright
from fpcn_dist.data.decoding.formats.header import DAMAGED, Header, UnreadableError
from fpcn_dist.data.decoding.photograph import decode, examine
from fpcn_dist.data.normalisation import Normalisation
from fpcn_dist.recipe.schema import DataConfig

VERSION: str = f"torchvision {torchvision.__version__}, {photograph.VERSION}"


class Decoding:
    """Running threads: turn requests into images, ahead of whoever takes them.

    Args:
        requests: what to decode; asked from the calling thread, before the batch is needed.
        config: sizes and preprocessing.
        device: where the images end up.
        batch_size: images of the largest request.
        threads: CPU threads.
    """

    def __init__(
        self, requests: Iterator[BatchRequest], config: DataConfig, device: torch.device, batch_size: int, threads: int
    ) -> None:
        self._requests, self._config, self._device = requests, config, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decoding")
        self._in_flight: deque[tuple[Tensor, list[Future[None]]]] = deque()
        self._normalised = Normalisation(config.preprocessing, device)

    def next(self) -> Tensor:
        """The images of the next request, [B, 3, crop, crop] float32, owned by the caller.

        Raises:
            StopIteration: there are no more requests.
            RuntimeError: a file of the batch cannot be read or decoded; the decoding is then of no further use.
        """
        while len(self._in_flight) < BATCHES_IN_FLIGHT and (request := next(self._requests, None)) is not None:
            self._in_flight.append(self._begin(request))
        if not self._in_flight:
            raise StopIteration
        pixels_BHWC, parts = self._in_flight.popleft()
        for part in parts:
            part.result()
        return self._normalised(pixels_BHWC.to(self._device, non_blocking=True))

    def close(self) -> None:
        """Stop the threads; what has not been begun is not decoded any more."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, request: BatchRequest) -> tuple[Tensor, list[Future[None]]]:
        """Let the threads decode a request: where the pixels will be, [B, crop, crop, 3] uint8, and what to wait for.

        On their way to a GPU the pixels lie in pinned memory, so that neither host nor device waits for the copy.
        """
        side = self._config.crop
        pinned = self._device.type == "cuda"
        pixels_BHWC = torch.empty(len(request.blobs), side, side, 3, dtype=torch.uint8, pin_memory=pinned)
        # Through NumPy, threads may also write into what was made in inference mode, which they are not in.
        parts = zip(request.blobs, request.views, pixels_BHWC.numpy(), strict=True)
        return pixels_BHWC, [self._pool.submit(_fill, blob, view, pixels, self._config) for blob, view, pixels in parts]


def _fill(blob: Blob, view: np.void, made_HWC: NDArray[np.uint8], config: DataConfig) -> None:
    """Write a view of a file into [crop, crop, 3] uint8.

    Raises:
        RuntimeError: the file cannot be read or decoded.
    """
    try:
        header = examine(blob.read(), config.max_pixels, salvage=config.on_bad_image == "salvage")
        image_HWC = pixels(header)
    except (OSError, UnreadableError) as error:
        raise RuntimeError(f"{blob} cannot be read or decoded: {error}") from error
    made_HWC[:] = view_pixels(torch.from_numpy(image_HWC), view, config).numpy()


def pixels(header: Header) -> NDArray[np.uint8]:
    """The pixels of an image file, upright: [H, W, 3] uint8 RGB.

    Raises:
        UnreadableError: they are not all there, or damaged.
    """
    if not header.plain:
        return decode(header)
    encoded = torch.frombuffer(bytearray(header.encoded), dtype=torch.uint8)
    try:
        stored_CHW = decode_image(encoded, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise UnreadableError(DAMAGED) from error
    return np.ascontiguousarray(upright(stored_CHW.permute(1, 2, 0).numpy(), header.orientation))
