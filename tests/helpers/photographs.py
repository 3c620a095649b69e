"""Small valid image files of every format and mode that is read, drawn by a random generator."""

from __future__ import annotations

import io
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def picture(rng: Random) -> Image.Image:
    """An RGB picture of 16 to 64 pixels a side, in which no two corners look alike, with noise."""
    width, height = (48, 48) if rng.random() < 0.5 else (rng.randrange(16, 65), rng.randrange(16, 65))
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    levels = np.stack([200 * across, 200 * down, 120 * across * down + 60 * (1 - across)], axis=2)
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 40, levels.shape)
    return Image.fromarray((levels + noise).astype(np.uint8))


def exif(rng: Random) -> Image.Exif | None:
    """No EXIF, or an orientation, alone or among other entries."""
    if rng.random() < 0.25:
        return None
    tags = Image.Exif()
    tags[ORIENTATION] = rng.randrange(1, 9)
    if rng.random() < 0.5:
        tags[0x010F], tags[0x011A], tags[0x0132] = "Some Maker", 72.0, "2024:05:06 07:08:09"
        tags.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    return tags


def _save(image: Image.Image, form: str, tags: Image.Exif | None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options, **({} if tags is None else {"exif": tags}))
    return buffer.getvalue()


def jpeg(rng: Random) -> bytes:
    """Baseline or progressive; colour, grey or CMYK; any chroma subsampling; with or without restart markers."""
    options: dict[str, Any] = {"quality": rng.choice([30, 75, 95]), "progressive": rng.random() < 0.4}
    if rng.random() < 0.3:
        options["restart_marker_blocks"] = rng.randrange(1, 5)
    mode = rng.choice(["RGB", "RGB", "RGB", "L", "CMYK"])
    if mode == "RGB":
        options["subsampling"] = rng.choice(["4:4:4", "4:2:2", "4:2:0"])
    if rng.random() < 0.2:
        options["comment"] = b"a comment"
    return _save(picture(rng).convert(mode), "JPEG", exif(rng), **options)


def png(rng: Random) -> bytes:
    """Every mode of Pillow's, with and without transparency."""
    image, options = picture(rng), dict[str, Any]()
    mode = rng.choice(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    if mode in ("L", "P", "RGB") and rng.random() < 0.3:
        options["transparency"] = (1, 2, 3) if mode == "RGB" else 3
    return _save(image, "PNG", exif(rng), **options)


def webp(rng: Random) -> bytes:
    """Lossy or lossless, with or without alpha."""
    image = picture(rng).convert(rng.choice(["RGB", "RGBA"]))
    return _save(image, "WEBP", exif(rng), lossless=rng.random() < 0.5, method=0)


def bmp(rng: Random) -> bytes:
    """One, eight, 24 and 32 bits."""
    return _save(picture(rng).convert(rng.choice(["1", "L", "P", "RGB", "RGBA"])), "BMP", None)


def tiff(rng: Random) -> bytes:
    """Every mode with every compression that suits it."""
    mode = rng.choice(["1", "L", "LA", "P", "RGB", "RGB", "RGB", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
    packed = [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"]
    if mode == "1":
        packed += ["group4"]
    if mode in ("L", "RGB", "YCbCr"):
        packed += ["jpeg"]
    image = picture(rng)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    else:
        image = image.convert(mode)
    options: dict[str, Any] = {}
    if compression := rng.choice(packed):
        options["compression"] = compression
    orientation = rng.randrange(0, 9)
    if orientation:
        options["tiffinfo"] = {ORIENTATION: orientation}
    return _save(image, "TIFF", None, **options)


def gif(rng: Random) -> bytes:
    """One or several frames."""
    first = picture(rng).convert("P")
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options |= {"save_all": True, "append_images": [first.transpose(Image.Transpose.ROTATE_180)]}
    return _save(first, "GIF", None, **options)


FORMS: dict[str, Callable[[Random], bytes]] = {
    "jpeg": jpeg,
    "png": png,
    "webp": webp,
    "bmp": bmp,
    "tiff": tiff,
    "gif": gif,
}
