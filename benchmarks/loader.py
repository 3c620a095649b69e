"""CPU cost of an image: this package's pipeline beside torchvision's two usual ways, on the same files and threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks._augmentations import AUGMENTATIONS, by_v2, mixed_by_v2
from benchmarks._shapes import Made, Stored, others, reading
from fpcn_dist.data.batch import BatchRequest
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.backends import has_dali, open_backend
from fpcn_dist.data.index.check.images import cache_file, check_images
from fpcn_dist.data.index.folder.folders import find_images
from fpcn_dist.data.mixing import mix, mixture
from fpcn_dist.data.views import views
from fpcn_dist.recipe import command_line
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.cores import usable_cores
from fpcn_dist.runtime.errors import UserError

_BATCH_SIZE = 32
_CLASSES = 3


@dataclass
class Cost:
    """What a loader took, one entry per repeat: CPU and wall-clock milliseconds per image."""

    cpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)


def _pil(config: DataConfig) -> Callable[[str], Any]:
    size = (config.resize, config.resize)
    transform = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode(config.preprocessing.interpolation)),
            transforms.RandomCrop(config.crop),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(config.preprocessing.mean, config.preprocessing.std),
        ]
    )
    return lambda path: transform(PIL.Image.open(path).convert("RGB"))


def _ours(blobs: Sequence[Blob], config: DataConfig, threads: int) -> Iterator[Tensor]:
    ids = np.arange(len(blobs))
    parts = [slice(start, start + _BATCH_SIZE) for start in range(0, len(blobs), _BATCH_SIZE)]
    requests = (BatchRequest(list(blobs[part]), views(0, ids[part], ids[part], config)) for part in parts)
    decoding = open_backend(config.backend).decoding(requests, config, torch.device("cpu"), _BATCH_SIZE, threads)
    with contextlib.closing(decoding):
        for step in range(len(parts)):
            images, how = decoding.next(), mixture(0, step, config.crop, config.augment)
            yield images if how is None else mix(images, _labels(images), _CLASSES, how)[0]


def _labels(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % _CLASSES


def loader_benchmark(data: Path, config: DataConfig, *, images: int = 512, repeats: int = 5) -> dict[str, Cost]:
    """Measure the loaders in turn on the training views of the same files; prints one table.

    Each has the same number of threads or worker processes, and starts a repeat with nothing decoded ahead; workers
    exist before. CPU time is that of this process with all its threads, and of its workers.

    Args:
        data: a folder of images; those that cannot be decoded are left out.
        config: sizes and threads (None: one for each core).
        images: images per repeat; the files are taken again and again if there are fewer.
        repeats: the table shows medians over so many repeats, interleaved between the loaders, after a warm-up.

    Raises:
        UserError: no images in the folder.
    """
    paths, threads = _paths(data, config, images), config.threads or usable_cores()
    blobs = Blob.of_files(paths)
    pil, tensor = _torchvision(paths, _pil(config), threads), _torchvision(paths, by_v2(config), threads)
    loaders: dict[str, Callable[[], Iterable[Tensor]]] = {
        "torchvision DataLoader, PIL": lambda: pil,
        "torchvision DataLoader, decode_jpeg + v2 on uint8": lambda: tensor,
        "fpcn_dist (torchvision)": lambda: _ours(blobs, config.changed(backend="torchvision"), threads),
    }
    if has_dali():
        loaders["fpcn_dist (DALI)"] = lambda: _ours(blobs, config.changed(backend="dali"), threads)
    costs = _measured(loaders, repeats, "Measuring loaders")
    Console().print(_table(costs, f"{images} images, resize {config.resize}, crop {config.crop}, {threads} thread(s)"))
    return costs


def augmentation_benchmark(
    data: Path, config: DataConfig, *, images: int = 512, repeats: int = 5
) -> dict[str, tuple[Cost, Cost]]:
    """Measure each of :data:`AUGMENTATIONS` as :func:`loader_benchmark` does, beside torchvision's v2 on uint8.

    Returns:
        The cost of each, ours first.
    """
    paths, threads = _paths(data, config, images), config.threads or usable_cores()
    blobs = Blob.of_files(paths)
    costs: dict[str, tuple[Cost, Cost]] = {}
    for name, changes in AUGMENTATIONS.items():
        changed = config.changed(**changes)
        mixed, loader = mixed_by_v2(changed, _CLASSES), _torchvision(paths, by_v2(changed), threads)
        both: dict[str, Callable[[], Iterable[Tensor]]] = {
            "ours": lambda changed=changed: _ours(blobs, changed, threads),
            "v2": lambda mixed=mixed, loader=loader: (mixed(batch, _labels(batch))[0] for batch in loader),
        }
        found = _measured(both, repeats, name)
        costs[name] = found["ours"], found["v2"]
    backend = open_backend(config.backend).name
    title = f"{images} images, resize {config.resize}, crop {config.crop}, {threads} thread(s); CPU ms/image"
    table = Table("augmentation", f"ours ({backend})", "range", "v2", "range", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].no_wrap = True
    for name, pair in costs.items():
        table.add_row(name, *(cell for cost in pair for cell in _cells(cost)))
    Console().print(table)
    return costs


def shapes_benchmark(data: Path, config: DataConfig, *, images: int = 512, repeats: int = 5) -> dict[str, Cost]:
    """Measure folder, tar shards and Parquet files, read by us and by others, as :func:`loader_benchmark` does; then
    the reading of their bytes alone, in order and at random, from the disk. Prints two tables.

    We and those that can read at random do so; the others read in order and shuffle in a buffer. All but ours decode
    with torchvision, and make views with its v2 on uint8.

    Returns:
        The cost of each loader.

    Raises:
        UserError: no images in the folder.
    """
    paths, threads = list(dict.fromkeys(_paths(data, config, images))), config.threads or usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        stored = Stored.write(paths, Path(folder))
        loaders: dict[str, Callable[[], Iterable[Tensor]]] = {}
        for name, loader in others(stored, by_v2(config), _BATCH_SIZE, threads).items():
            loaders[name] = lambda loader=loader: loader
        backend = open_backend(config.backend).name
        for name, blobs in stored.blobs(config).items():
            drawn = [blobs[i] for i in np.random.default_rng(0).permutation(len(blobs))]
            loaders[f"fpcn_dist ({backend}), {name}"] = lambda drawn=drawn: _ours(drawn, config, threads)
        costs = _measured(loaders, repeats, "Measuring loaders")
        title = f"{len(paths)} images, resize {config.resize}, crop {config.crop}, {threads} thread(s)"
        Console().print(_table(costs, title))
        Console().print(reading(stored.blobs(config), threads, repeats))
    return costs


def _paths(data: Path, config: DataConfig, images: int) -> list[str]:
    files = list(find_images(data))
    checks = check_images(Blob.of_files(files), config.max_pixels, cache_file(data))
    usable = [str(file) for file, check in zip(files, checks, strict=True) if check.ok]
    if not usable:
        raise UserError("--data", data, "there are no usable images in it", "give a folder of photographs")
    return list(islice(cycle(usable), images))


def _torchvision(paths: Sequence[str], load: Callable[[str], Tensor], workers: int) -> DataLoader[Tensor]:
    files = Made(paths, load)
    return DataLoader(files, _BATCH_SIZE, num_workers=workers, persistent_workers=True, multiprocessing_context="fork")


def _measured(loaders: dict[str, Callable[[], Iterable[Tensor]]], repeats: int, shown: str) -> dict[str, Cost]:
    costs = {name: Cost() for name in loaders}
    for repeat in track(range(repeats + 1), shown, transient=True):
        for name, loader in loaders.items():
            cpu, wall = _cpu_seconds(), time.perf_counter()
            seen = sum(len(batch) for batch in loader())
            if repeat:
                costs[name].cpu_ms.append((_cpu_seconds() - cpu) / seen * 1e3)
                costs[name].wall_ms.append((time.perf_counter() - wall) / seen * 1e3)
    return costs


def _cpu_seconds() -> float:
    """CPU time so far of this process, all its threads, and its living children."""
    ticks = 0
    for child in multiprocessing.active_children():
        user, system = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        ticks += int(user) + int(system)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _table(costs: dict[str, Cost], title: str) -> Table:
    table = Table("loader", "CPU ms/image", "range", "images/s", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cost in costs.items():
        table.add_row(name, *_cells(cost), f"{1e3 / statistics.median(cost.wall_ms):.0f}")
    return table


def _cells(cost: Cost) -> tuple[str, str]:
    return f"{statistics.median(cost.cpu_ms):.2f}", f"{min(cost.cpu_ms):.2f} - {max(cost.cpu_ms):.2f}"


def loader(
    data: Path,
    images: int = 512,
    repeats: int = 5,
    augmentations: bool = False,
    shapes: bool = False,
    config: DataConfig = DataConfig(),  # noqa: B008
) -> None:
    """CPU milliseconds per image of the data pipeline beside torchvision's DataLoader.

    Args:
        data: Folder of images, at any depth.
        images: Images per repeat.
        repeats: Repeats, interleaved between the loaders; the table shows medians.
        augmentations: Measure each augmentation beside torchvision's v2 with the same set, in place of the loaders.
        shapes: Measure folder, tar shards and Parquet files beside WebDataset and Hugging Face's datasets, and what it
            costs to read them at random from the disk. All is written to the temporary folder (TMPDIR) for so long.
        config: Sizes and threads.
    """
    benchmark = shapes_benchmark if shapes else augmentation_benchmark if augmentations else loader_benchmark
    benchmark(data, config, images=images, repeats=repeats)


def main() -> None:
    command_line.run(lambda: tyro.cli(loader))
