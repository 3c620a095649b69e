"""Decoding without DALI: torchvision and Pillow in a pool of threads, on any machine that PyTorch runs on.

    path --read, decode--> RGB uint8 HWC --view--> uint8 --to the device--> --normalise--> float32 CHW

The images are those of :mod:`fpcn_dist.data.decoding.dali` on the CPU, bit for bit where a channel has 8 bits, and
within one grey level where it has 16. torchvision decodes JPEG alone: its PNG decoder crashes on damaged files, and its
WebP decoder ignores the EXIF orientation. All other formats are Pillow's.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from fpcn_dist.data.augmentation import view_pixels
from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.fault import find_fault
from fpcn_dist.data.normalisation import Normalisation
from fpcn_dist.recipe.schema import DataConfig

# data.max_pixels bounds what is decoded, and what Pillow would say of a bad file, we report with its path.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")

VERSION: str = f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"
_END_OF_PNG = b"IEND\xaeB`\x82"


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


def _fill(blob: Blob, view: np.void, pixels_HWC: NDArray[np.uint8], config: DataConfig) -> None:
    """Write a view of a file into [crop, crop, 3] uint8.

    Raises:
        RuntimeError: the file cannot be read or decoded.
    """
    try:
        image_HWC = decode(blob.read())
    except Exception as error:  # Pillow raises whatever its parsers stumble over
        raise RuntimeError(f"{blob} cannot be read or decoded: {error}") from error
    pixels_HWC[:] = view_pixels(image_HWC, view, config).numpy()


def decode(data: bytes) -> Tensor:
    """The pixels of an image file, upright: [H, W, 3] uint8 RGB.

    Raises:
        Exception: of any kind; the data are no image, truncated or damaged.
    """
    if data.startswith(_JPEG):
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True).permute(1, 2, 0).contiguous()
    if data.startswith(_PNG) and _END_OF_PNG not in data:
        raise ValueError("the file is cut short")  # behind the last pixel, where Pillow would not miss anything
    with _open(data) as image:
        return torch.from_numpy(np.array(_to_rgb(ImageOps.exif_transpose(image))))


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; grey levels of 16 bits, or from 0 to 1, are scaled to 8 bits, where Pillow would clip them."""
    if image.mode[0] in "IF":
        levels = np.asarray(image) * (255 if image.mode == "F" else 1 / 257)
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


class Decoder:
    """The decoder of the training, one image at a time."""

    def fault(self, data: bytes, max_pixels: int) -> str | None:
        """Why an image file cannot be used, or ``None`` where it can."""
        return find_fault(data, max_pixels, self)

    def size(self, data: bytes) -> tuple[int, int] | None:
        """Width and height that the header of an image file announces; ``None`` where it is no image."""
        try:
            with _open(data) as image:
                return image.size
        except Exception:  # Pillow raises whatever its parsers stumble over
            return None

    def decodes(self, data: bytes) -> bool:
        """Whether the pixels of an image file are all there."""
        try:
            decode(data)
        except Exception:
            return False
        return True
