"""All that touches NVIDIA DALI and nvImageCodec, its decoder: one pipeline for training, evaluation and prediction.

    file --read--> header, bytes --decode--> RGB uint8 HWC --turn, view--> [crop, crop] uint8 --normalise--> float32 CHW

DALI gets plain JPEGs alone, without their metadata; whatever else :mod:`fpcn_dist.data.decoding.photograph` takes is
decoded by it while reading, and DALI gets the pixels, behind the header of a portable pixmap. DALI knows of no
orientation: it is part of the view. On the CPU the view is made by PyTorch inside DALI's pipeline: the same antialiased
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
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import nvimgcodec
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode
from torch import Tensor

from fpcn_dist.data.augmentation import view_pixels
from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding import photograph
from fpcn_dist.data.decoding.formats.exif import TURNS, upright
from fpcn_dist.data.decoding.formats.header import UnreadableError
from fpcn_dist.data.decoding.photograph import decode, examine
from fpcn_dist.data.normalisation import Normalisation
from fpcn_dist.data.views import VIEW, Views
from fpcn_dist.recipe.preprocessing import Preprocessing
from fpcn_dist.recipe.schema import DataConfig

VERSION: str = f"nvImageCodec {nvimgcodec.__version__}, {photograph.VERSION}"
_NO_IMAGE = b"unreadable"
_T = TypeVar("_T")
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
        self._afterwards = PlainAfterwards() if is_plain(config) else Afterwards(config, device)
        with self._pipeline:
            self._pipeline.set_outputs(self._images(requests, threads))
        self._pipeline.build()

    def _images(self, requests: Iterator[BatchRequest], threads: int) -> DataNode:
        read = read_ahead(requests, self._config, threads)
        if self._device.type == "cpu":
            return views_by_torch(read, self._config, threads)
        if is_plain(self._config):
            return plain_views_by_dali(self._afterwards.note(read), self._config, "mixed")
        return decoded_by_dali(self._afterwards.note(read), "mixed")

    def next(self) -> Tensor:
        """The images of the next request, [B, 3, crop, crop] float32, owned by the caller.

        Raises:
            StopIteration: there are no more requests.
            RuntimeError: a file of the batch cannot be read or decoded; the pipeline is then of no further use.
        """
        # Handing DALI the stream that will read the images ties their memory to it: no wait, no copy, no early reuse.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (images,) = self._pipeline.run(stream)
        return self._afterwards(images) if self._device.type == "cuda" else torch.from_dlpack(images.as_tensor())

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
        self._read: deque[Read] = deque()

    def note(self, read: Iterator[Read]) -> Iterator[Read]:
        """The same requests, whose views and orientations are kept until their images come."""
        for request in read:
            self._read.append(request)
            yield request

    def __call__(self, images: Any) -> Tensor:
        """The views [B, 3, crop, crop] float32 of a list of uint8 HWC images of any sizes, as stored."""
        read = self._read.popleft()
        pixels = []
        for index, (orientation, view) in enumerate(zip(read.orientations.tolist(), read.views, strict=True)):
            pixels.append(view_pixels(_upright(torch.from_dlpack(images[index]), orientation), view, self._config))
        return self._normalised(torch.stack(pixels))


class PlainAfterwards:
    """Exchanges rows and columns of the views that lack it: DALI resizes and mirrors them as the image is stored."""

    def __init__(self) -> None:
        self._exchanged: deque[NDArray[np.intp]] = deque()

    def note(self, read: Iterator[Read]) -> Iterator[Read]:
        """The same requests, of which it is kept until their images come which are to be changed."""
        for request in read:
            exchange = [TURNS[orientation].exchange for orientation in request.orientations.tolist()]
            self._exchanged.append(np.flatnonzero(exchange))
            yield request

    def __call__(self, images: Any) -> Tensor:
        """The views [B, 3, crop, crop] float32."""
        views = torch.from_dlpack(images.as_tensor())
        for index in self._exchanged.popleft().tolist():
            views[index] = views[index].transpose(1, 2).clone()
        return views


def _upright(image_HWC: Tensor, orientation: int) -> Tensor:
    """The pixels as they are to be looked at, on their device."""
    turn = TURNS[orientation]
    turned = image_HWC.transpose(0, 1) if turn.exchange else image_HWC
    reversed_ = [axis for axis, reverse in enumerate((turn.reverse_rows, turn.reverse_columns)) if reverse]
    return turned.flip(reversed_).contiguous() if orientation > 1 else image_HWC


class Read(NamedTuple):
    """A request whose bytes are at hand.

    Attributes:
        encoded: what DALI decodes, one image each.
        orientations: [B] EXIF's, of what DALI decodes.
        views: of the upright images.
    """

    encoded: list[NDArray[np.uint8]]
    orientations: NDArray[np.int32]
    views: Views


def read_ahead(requests: Iterator[BatchRequest], config: DataConfig, threads: int) -> Iterator[Read]:
    """Requests with what DALI decodes, which threads read while the batches before them are decoded and used.

    Bytes are read two batches ahead; of these, what Pillow decodes is decoded one batch ahead.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="reading")
    reading = (([pool.submit(_read, blob) for blob in request.blobs], request.views) for request in requests)
    decoding = (
        ([pool.submit(_prepare, part, config) for part in parts], views)
        for parts, views in _ahead(reading, BATCHES_IN_FLIGHT - 1)
    )
    try:
        for parts, views in _ahead(decoding, 1):
            encoded, orientations = zip(*(part.result() for part in parts), strict=True)
            yield Read(list(encoded), np.array(orientations, dtype=np.int32), views)
    finally:
        # An abandoned pipeline is collected at any time, in a thread that is just being started, too, where to wait
        # for another thread is to wait for ever.
        pool.shutdown(wait=False, cancel_futures=True)


def _ahead(items: Iterator[_T], count: int) -> Iterator[_T]:
    """The same items, each drawn ``count`` items before it is needed."""
    drawn = deque(itertools.islice(items, count))
    for item in items:
        drawn.append(item)
        yield drawn.popleft()
    yield from drawn


def _read(blob: Blob) -> bytes:
    """Its bytes; of what cannot be read none, so that it fails with its own batch."""
    try:
        return blob.read()
    except OSError:
        return b""


def _prepare(reading: Future[bytes], config: DataConfig) -> tuple[NDArray[np.uint8], int]:
    """What DALI decodes of an image, and its orientation; of what is not shown, bytes that no decoder takes."""
    try:
        header = examine(reading.result(), config.max_pixels, salvage=config.on_bad_image == "salvage")
        if header.plain:
            return np.frombuffer(header.encoded, dtype=np.uint8), header.orientation
        return np.frombuffer(_pixmap(decode(header)), dtype=np.uint8), 1
    except UnreadableError:
        return np.frombuffer(_NO_IMAGE, dtype=np.uint8), 1


def _pixmap(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """A file of the pixels that costs nothing to decode."""
    height, width, _ = pixels_HWC.shape
    return b"P6 %d %d 255\n" % (width, height) + pixels_HWC.tobytes()


def _decode(encoded: DataNode, device: str) -> DataNode:
    # Fancy upsampling is what the CPU decoder does to chroma; asked for, the GPU gives the same image.
    return fn.decoders.image(
        encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True, adjust_orientation=False
    )


def _normalise(pixels: DataNode, shown: Preprocessing) -> DataNode:
    return fn.crop_mirror_normalize(
        pixels,
        mean=[255 * value for value in shown.mean],
        std=[255 * value for value in shown.std],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def decoded_by_dali(read: Iterator[Read], device: str) -> DataNode:
    """The images as their files have them: uint8 HWC of any sizes; ``device`` is "mixed" (to a GPU) or "cpu"."""
    return _decode(fn.external_source(source=lambda: next(read).encoded, batch=True), device)


def plain_views_by_dali(read: Iterator[Read], config: DataConfig, device: str) -> DataNode:
    """Crops of the squeezed images, mirrored where their views say so, by DALI alone: float32 CHW, normalised.

    Rows and columns are those of the image as stored; :class:`PlainAfterwards` exchanges them where they should be.
    """

    def source() -> tuple[list[NDArray[np.uint8]], NDArray[np.float32], NDArray[np.float32]]:
        request = next(read)
        return request.encoded, *_stored_corners(request, config)

    encoded, start, end = fn.external_source(source=source, num_outputs=3, batch=True)
    return _normalise(resize_by_dali(_decode(encoded, device), start, end, config), config.preprocessing)


def _stored_corners(read: Read, config: DataConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[B, 2] where rows and columns of crops begin and end, in shares of the stored image; backwards where mirrored."""
    room = config.resize - config.crop
    start = (np.stack([read.views["down"], read.views["right"]], axis=1) * room).round()
    end = start + config.crop
    flipped = np.flatnonzero(read.views["flip"])
    start[flipped, 1], end[flipped, 1] = end[flipped, 1], start[flipped, 1].copy()
    start, end = start / config.resize, end / config.resize
    for index, orientation in enumerate(read.orientations.tolist()):
        turn = TURNS[orientation]
        for axis in np.flatnonzero([turn.reverse_rows, turn.reverse_columns]):
            start[index, axis], end[index, axis] = 1 - start[index, axis], 1 - end[index, axis]
        if turn.exchange:
            start[index], end[index] = start[index, ::-1].copy(), end[index, ::-1].copy()
    return start.astype(np.float32), end.astype(np.float32)


def views_by_torch(read: Iterator[Read], config: DataConfig, threads: int) -> DataNode:
    """Views of any kind, made by PyTorch on the CPU: float32 CHW, normalised."""
    pool = ThreadPoolExecutor(threads)

    def source() -> tuple[list[NDArray[np.uint8]], NDArray[np.int32], NDArray[np.uint8]]:
        encoded, orientations, views = next(read)
        return encoded, orientations, views.view(np.uint8).reshape(len(views), -1)

    def make(image: NDArray[np.uint8], orientation: NDArray[np.int32], view: NDArray[np.uint8]) -> NDArray[np.uint8]:
        turned = np.ascontiguousarray(upright(image, orientation.item()))
        return np.ascontiguousarray(view_pixels(torch.from_numpy(turned), view.view(VIEW)[0], config).numpy())

    def make_batch(*columns: list[NDArray[Any]]) -> list[NDArray[np.uint8]]:
        return list(pool.map(make, *columns))

    encoded, orientation, view = fn.external_source(source=source, num_outputs=3, batch=True)
    images = _decode(encoded, "cpu")
    made = fn.python_function(
        images, orientation, view, function=make_batch, batch_processing=True, output_layouts="HWC"
    )
    return _normalise(made, config.preprocessing)


def resize_by_dali(decoded: DataNode, start: DataNode, end: DataNode, config: DataConfig) -> DataNode:
    """Resize uint8 HWC images to what lies between two corners [row, column], in shares of the image; only that is
    resampled, and mirrored where it ends before it starts."""
    return fn.resize(
        decoded,
        size=(config.crop, config.crop),
        roi_start=start,
        roi_end=end,
        roi_relative=True,
        antialias=True,
        interp_type=_INTERPOLATIONS[config.preprocessing.interpolation],
    )
