"""Why an image file cannot be used. Imports no torch."""

from __future__ import annotations

from typing import Protocol


class Decodes(Protocol):
    """Reads headers and pixels, one image at a time."""

    def size(self, data: bytes) -> tuple[int, int] | None:
        """Width and height that the header of an image file announces; ``None`` where it is no image."""
        ...

    def decodes(self, data: bytes) -> bool:
        """Whether the pixels of an image file are all there."""
        ...


def find_fault(data: bytes, max_pixels: int, decoder: Decodes) -> str | None:
    """Why an image file cannot be used, or ``None`` where it can.

    The number of pixels is read from the header, and nothing is decoded where it exceeds ``max_pixels``.
    """
    if not data:
        return "the file is empty"
    size = decoder.size(data)
    if size is None:
        return "not a JPEG, PNG, WebP, BMP or TIFF image, or its header is damaged"
    width, height = size
    if width * height > max_pixels:
        found = f"{width} x {height} = {width * height:,} pixels"
        return f"its header announces {found}, more than data.max_pixels {max_pixels:,}"
    return None if decoder.decodes(data) else "the image data are truncated or damaged"
