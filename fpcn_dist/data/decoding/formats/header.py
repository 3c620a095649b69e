"""What a header says of an image file, and why a file is not shown."""

from __future__ import annotations

from typing import NamedTuple

DAMAGED = "the image data are truncated or damaged"
NO_IMAGE = "not a JPEG, PNG, WebP, BMP, TIFF, GIF, HEIC or AVIF image, or its header is damaged"


class UnreadableError(ValueError):
    """A file is not shown; says why, without its path."""


class Header(NamedTuple):
    """An image file of which nothing has been decoded yet.

    Attributes:
        form: Pillow's name of the format, or ``HEIC``.
        width, height: in pixels, as stored.
        orientation: EXIF's, 1 to 8: how the stored pixels have to be turned.
        encoded: the file without what says nothing of its pixels.
        mode: what a pixel is, in words.
        plain: every decoder makes the same pixels of ``encoded``; of other files Pillow alone is asked.
        cut: a JPEG whose end is missing.
    """

    form: str
    width: int
    height: int
    orientation: int
    encoded: bytes
    mode: str
    plain: bool = False
    cut: bool = False


def not_read(form: str, mode: str) -> UnreadableError:
    """The refusal of a format or mode that no two programs would show alike."""
    return UnreadableError(f"{form} with {mode}, which is not read: convert it to JPEG or PNG of 8 bits a channel")
