"""Procedural photographs of three rocks: a data set for the demo, the tests and machines without real photographs.

Each image is a rock-shaped blob, anywhere and of any size, on a background that says nothing about its class:

- ``basalt``: dark and vesicular, with round pores that have a lit rim;
- ``dolomite``: beige to pink, a mosaic of crystalline grains;
- ``marble``: light, with turbulent veins.

Exposure and white balance vary so far that the mean colour of an image does not give its class away: a model has to
find the object and to look at its texture. Needs NumPy and Pillow alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fpcn_dist.runtime.errors import UserError

Array = NDArray[np.floating]
Rng = np.random.Generator


def generate(
    root: Path, *, images_per_class: int = 200, seed: int = 0, min_side: int = 192, max_side: int = 320
) -> None:
    """Write ``root/<class>/NNNN.jpg`` for the classes basalt, dolomite and marble.

    Every image is a function of (seed, class, number) alone, so a larger set contains the smaller one.

    Args:
        root: the folder to write to; made if missing, images of the same name are overwritten.
        images_per_class: images written for each class.
        seed: key of all random draws.
        min_side: smallest height and width in pixels; both are drawn independently.
        max_side: largest height and width in pixels.

    Raises:
        UserError: no images or a negative seed asked for, or a folder that cannot be made.
    """
    if images_per_class < 1:
        raise UserError("images_per_class", images_per_class, "there would be nothing to draw", "ask for at least 1")
    if seed < 0:
        raise UserError("seed", seed, "a seed is not negative", "use 0 or more")
    for label, (name, texture) in enumerate(TEXTURES.items()):
        folder = Path(root) / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"the folder cannot be made ({error.strerror})"
            raise UserError("--output", root, reason, "choose another folder") from None
        for number in range(images_per_class):
            rng = np.random.Generator(np.random.Philox(key=[seed, label << 32 | number]))
            height, width = rng.integers(min_side, max_side + 1, size=2).tolist()
            image = Image.fromarray(_photograph(rng, height, width, texture))
            image.save(folder / f"{number:04d}.jpg", quality=int(rng.integers(60, 96)))


def _photograph(rng: Rng, height: int, width: int, texture: Callable[[Rng, int, int, float], Array]) -> NDArray:
    """One [height, width, 3] uint8 image: background, shadow, shaded rock, then the camera's exposure and noise."""
    radius = 0.5 * min(height, width) * rng.uniform(0.42, 0.85)
    coverage, normal_y, normal_x = _blob(rng, height, width, radius)
    light = rng.uniform(-1, 1, size=2) * (1, 0.8) - (0.4, 0)
    # One unit of texture (pore, grain, vein) is a fraction of the rock, as if the camera had moved, not the rock grown.
    rock = texture(rng, height, width, radius * rng.uniform(0.08, 0.14))
    shading = 0.8 + 0.35 * (light[0] * normal_y + light[1] * normal_x)
    shading += 0.12 * (_noise(rng, height, width, 6, 6) - 0.5)
    rock *= shading[..., None]

    image = _background(rng, height, width)
    reach = 0.16 * radius
    shadow = np.roll(coverage, (round(-light[0] * reach), round(-light[1] * reach)), axis=(0, 1))
    image *= 1 - 0.55 * _blur(shadow, reach)[..., None]
    image += coverage[..., None] * (rock - image)

    exposure = np.exp(rng.uniform(-0.45, 0.4))
    white_balance = np.exp(rng.normal(0, 0.05, size=3))
    image *= (exposure * white_balance).astype(np.float32)
    image += rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(0.005, 0.025)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _blob(rng: Rng, height: int, width: int, radius: float) -> tuple[Array, Array, Array]:
    """Coverage in [0, 1] and the y and x components of the surface normal of a rock, each [height, width]."""
    margin = 0.75 * radius
    y, x = _grid(height, width, rng.uniform(margin, height - margin), rng.uniform(margin, width - margin))
    turn, flatten = rng.uniform(0, math.pi), rng.uniform(0.65, 1.0)
    u = (x * math.cos(turn) + y * math.sin(turn)) / radius
    v = (y * math.cos(turn) - x * math.sin(turn)) / (radius * flatten)
    # Cutting a disc by a few chords gives the flat faces and blunt corners of broken stone.
    distance = np.hypot(u, v)
    for angle in rng.uniform(0, 2 * math.pi, size=int(rng.integers(4, 8))):
        distance = np.maximum(distance, (u * math.cos(angle) + v * math.sin(angle)) / rng.uniform(0.7, 0.95))
    distance += 0.22 * (_noise(rng, height, width, 5, 5) - 0.5)
    coverage = np.clip((1 - distance) * radius / 1.5 + 0.5, 0, 1)
    height_map = np.sqrt(np.clip(1 - distance, 0, 1))
    normal_y, normal_x = np.gradient(_blur(height_map, 0.06 * radius))
    return coverage, -normal_y * radius * 0.5, -normal_x * radius * 0.5


def _basalt(rng: Rng, height: int, width: int, unit: float) -> Array:
    """Dark, with round pores: a black hole, and a lit rim on its lower side."""
    canvas = Image.fromarray(np.full((height, width), 128, dtype=np.uint8))
    draw = ImageDraw.Draw(canvas)
    count = int(height * width / unit**2 * rng.uniform(0.25, 0.5))
    centres = rng.uniform((0, 0), (width, height), size=(count, 2))
    radii = unit * np.clip(rng.lognormal(-1.15, 0.45, size=count), 0.12, 0.9)
    for (x, y), r in zip(centres.tolist(), radii.tolist(), strict=True):
        draw.ellipse((x - r, y - 0.8 * r, x + r, y + 1.2 * r), fill=190)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=20)
    pores = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32) / 128
    base = np.array([0.27, 0.26, 0.27]) * rng.uniform(0.8, 1.5) + rng.normal(0, 0.012, size=3)
    speckle = 0.7 + 0.6 * _noise(rng, height, width, height / 3, width / 3)
    return (pores * speckle)[..., None] * base.astype(np.float32)


def _dolomite(rng: Rng, height: int, width: int, unit: float) -> Array:
    """Beige to pink: a mosaic of grains (Voronoi cells of a jittered lattice), each of its own brightness."""
    y, x = _grid(height, width, 0, 0)
    edge = np.float32(unit * rng.uniform(0.5, 0.8))
    y, x = y / edge, x / edge
    rows, columns = int(y[-1, 0]) + 3, int(x[0, -1]) + 3
    offset = rng.random((2, rows, columns), dtype=np.float32)
    shade = rng.normal(1, 0.17, size=(rows, columns)).astype(np.float32)
    lattice = y.astype(np.intp) * columns + x.astype(np.intp)
    seed_y = (np.arange(-1, rows - 1, dtype=np.float32)[:, None] + offset[0]).ravel()
    seed_x = (np.arange(-1, columns - 1, dtype=np.float32)[None, :] + offset[1]).ravel()
    nearest = np.full((height, width), np.inf, dtype=np.float32)
    grain = np.zeros_like(nearest)
    for neighbour in (row * columns + column for row in range(3) for column in range(3)):
        cell = lattice + neighbour
        distance = (seed_y.take(cell) - y) ** 2 + (seed_x.take(cell) - x) ** 2
        closer = distance < nearest
        nearest = np.where(closer, distance, nearest)
        grain = np.where(closer, shade.take(cell), grain)
    pink = rng.uniform(0, 1)
    base = np.array([0.70, 0.60 - 0.07 * pink, 0.48 + 0.03 * pink]) * rng.uniform(0.7, 1.1)
    grain *= 1.05 - 0.25 * nearest
    return grain[..., None] * base.astype(np.float32)


def _marble(rng: Rng, height: int, width: int, unit: float) -> Array:
    """Light, with veins: the zero lines of a wave whose phase is turbulent."""
    y, x = _grid(height, width, 0, 0)
    turn, wavelength = rng.uniform(0, math.pi), unit * rng.uniform(3.5, 6)
    turbulence = _noise(rng, height, width, height / (5 * unit), width / (5 * unit), octaves=4)
    phase = (x * math.cos(turn) + y * math.sin(turn)) * (math.pi / wavelength) + rng.uniform(6, 11) * turbulence
    vein = np.exp(-np.abs(np.sin(phase)) * rng.uniform(5, 9))
    cloud = _noise(rng, height, width, 4, 4)
    base = np.array([0.74, 0.73, 0.71]) * rng.uniform(0.72, 1.12) + rng.normal(0, 0.02, size=3)
    return ((1 - 0.62 * vein) * (0.85 + 0.25 * cloud))[..., None] * base.astype(np.float32)


TEXTURES: dict[str, Callable[[Rng, int, int, float], Array]] = {
    "basalt": _basalt,
    "dolomite": _dolomite,
    "marble": _marble,
}


class _Ground(NamedTuple):
    """A background: colours of its darkest and lightest parts, and pixels per noise cell down and across."""

    dark: tuple[float, float, float]
    light: tuple[float, float, float]
    cell_y: float
    cell_x: float


_GROUNDS = (
    _Ground((0.10, 0.20, 0.05), (0.45, 0.60, 0.22), 14, 3),  # grass
    _Ground((0.48, 0.38, 0.25), (0.86, 0.76, 0.58), 2.5, 2.5),  # sand
    _Ground((0.28, 0.16, 0.09), (0.66, 0.45, 0.28), 4, 120),  # wooden table
    _Ground((0.42, 0.55, 0.75), (0.88, 0.92, 0.98), 160, 160),  # sky
    _Ground((0.08, 0.08, 0.09), (0.32, 0.31, 0.30), 3, 3),  # wet soil
    _Ground((0.60, 0.60, 0.60), (0.95, 0.95, 0.94), 90, 90),  # white cloth
)


def _background(rng: Rng, height: int, width: int) -> Array:
    """One of the grounds, [height, width, 3], unevenly lit."""
    ground = _GROUNDS[rng.integers(len(_GROUNDS))]
    dark, light = np.array(ground.dark, dtype=np.float32), np.array(ground.light, dtype=np.float32)
    blend = _noise(rng, height, width, height / ground.cell_y, width / ground.cell_x)
    lighting = 0.75 + 0.5 * _noise(rng, height, width, 2, 2, octaves=1)
    return (dark + blend[..., None] * (light - dark)) * lighting[..., None]


def _grid(height: int, width: int, centre_y: float, centre_x: float) -> tuple[Array, Array]:
    """Pixel coordinates relative to a centre, broadcast to [height, width] each."""
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(centre_y)
    x = np.arange(width, dtype=np.float32)[None, :] - np.float32(centre_x)
    return np.broadcast_to(y, (height, width)), np.broadcast_to(x, (height, width))


def _noise(rng: Rng, height: int, width: int, cells_y: float, cells_x: float, octaves: int = 3) -> Array:
    """Fractal noise in about [0, 1], [height, width], its coarsest octave having cells_y x cells_x cells."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(octaves):
        rows = max(2, min(height, round(cells_y * 2**octave)))
        columns = max(2, min(width, round(cells_x * 2**octave)))
        cells = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
        total += np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC)) * np.float32(0.5**octave)
    return total / np.float32(2 - 0.5 ** (octaves - 1))


def _blur(field: Array, sigma: float) -> Array:
    """Gaussian blur of a [height, width] field in [0, 1] to a standard deviation of ``sigma`` pixels."""
    image = Image.fromarray((field * 255 + 0.5).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32) / 255
