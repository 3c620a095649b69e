"""The one reading of a photograph: whether a file is shown, as which pixels, or why not.

All decoders ask here first, so that they decide alike: NVIDIA DALI and torchvision in training and evaluation, the
check before it, and Pillow in prediction without PyTorch. Size, mode and orientation are read from the file by parsers
of our own, which are bounded and take damaged bytes for what is left of them. Decoders get the data of pixels alone:
they never see metadata that they might stumble over, and turn nothing.

There are two kinds of files. *Plain* JPEGs, of 8 bits, grey or YCbCr, are decoded to the same bits by every decoder,
and each caller takes the fastest that it has. All else is decoded by Pillow, whoever asks.

Imports no torch.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from fpcn_dist.data.decoding.formats import bitmaps, heif, jpeg, png, tiff, webp
from fpcn_dist.data.decoding.formats.exif import upright
from fpcn_dist.data.decoding.formats.header import DAMAGED, NO_IMAGE, Header, UnreadableError

# The caller's bound on pixels counts, and what Pillow would say of a file, we report with its path.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")

VERSION: str = f"reading 1, Pillow {PIL.__version__}, {heif.VERSION}"
"""Of what decides about files here; a change of it has all files checked anew."""

_PARSERS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes], Header]], ...] = (
    (jpeg.is_jpeg, jpeg.parse),
    (png.is_png, png.parse),
    (webp.is_webp, webp.parse),
    (tiff.is_tiff, tiff.parse),
    (bitmaps.is_bmp, bitmaps.parse_bmp),
    (bitmaps.is_gif, bitmaps.parse_gif),
    (heif.is_heif, heif.parse),
)


def examine(data: bytes, max_pixels: int, *, salvage: bool = False) -> Header:
    """Read the header of an image file, and decode nothing.

    Args:
        data: the file.
        max_pixels: more than that many are refused.
        salvage: take a JPEG that was cut short, too; how much of it is there, :func:`decode` finds out.

    Raises:
        UnreadableError: the file is not shown; says why.
    """
    if not data:
        raise UnreadableError("the file is empty")
    parse = next((parse for fits, parse in _PARSERS if fits(data)), None)
    if parse is None:
        raise UnreadableError(NO_IMAGE)
    header = parse(data)
    if min(header.width, header.height) < 1:
        raise UnreadableError(NO_IMAGE)
    if header.width * header.height > max_pixels:
        found = f"{header.width} x {header.height} = {header.width * header.height:,} pixels"
        raise UnreadableError(f"its header announces {found}, more than data.max_pixels {max_pixels:,}")
    if header.cut and not salvage:
        raise UnreadableError(DAMAGED)
    return header


def decode(header: Header) -> NDArray[np.uint8]:
    """The pixels of a file by Pillow, upright: [H, W, 3] uint8 RGB, the caller's own.

    Raises:
        UnreadableError: the pixels are not all there, or damaged.
    """
    stored = jpeg.salvage(header, _stored)[0] if header.cut else _stored(header)
    return np.array(upright(stored, header.orientation), order="C")


def _stored(header: Header) -> NDArray[np.uint8]:
    """[height, width, 3] uint8 RGB, as stored."""
    try:
        with _open(header) as image:
            if image.size != (header.width, header.height):
                raise UnreadableError(NO_IMAGE)
            return _to_rgb(image)
    except UnreadableError:
        raise
    except MemoryError as error:
        raise UnreadableError("decoding it takes too much memory") from error
    except Exception as error:  # Pillow raises whatever its parsers stumble over
        raise UnreadableError(DAMAGED) from error


def _open(header: Header) -> Image.Image:
    if header.form == "HEIC":
        return heif.open_heic(header.encoded)
    return Image.open(io.BytesIO(header.encoded), formats=(header.form,))


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """RGB of any mode; transparency is dropped, and 16 bits are scaled to 8, where Pillow would clip them."""
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float32)
        image = Image.fromarray((levels / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    return np.asarray(image.convert("RGB"))


class Decoder:
    """Whether torchvision shows a file: of plain JPEGs, too, Pillow reads what torchvision does, without torch."""

    def fault(self, data: bytes, max_pixels: int) -> str | None:
        """Why an image file is not shown, or ``None`` where it is."""
        try:
            decode(examine(data, max_pixels))
        except UnreadableError as error:
            return str(error)
        return None


class Salvager:
    """Whether a JPEG that was cut short is shown where ``data.on_bad_image`` is ``salvage``."""

    def fault(self, data: bytes, max_pixels: int) -> str | None:
        """Why not, or ``None`` where it is; what was not cut short is refused."""
        try:
            header = examine(data, max_pixels, salvage=True)
            if not header.cut:
                return DAMAGED
            decode(header)
        except UnreadableError as error:
            return str(error)
        return None
