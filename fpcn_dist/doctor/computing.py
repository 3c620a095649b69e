"""These checks try what training does to images (decode, pool, contrast in pairs) and look at the user's own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fpcn_kernels
import numpy as np
import torch
from fpcn_kernels import reference
from PIL import Image
from torch import Tensor

from fpcn_dist.data.blob import Blob
from fpcn_dist.doctor.findings import Finding, ok, problem, warning
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.address import Address, RemoteFolder

_TOLERANCE = 1e-3
"""The error of float32 against float64 may be so large, relative to the largest value; rounding makes a hundredth."""


def decoding(device: torch.device) -> Iterator[Finding]:
    """Compare what the pipeline of the training makes of one JPEG with what Pillow makes of it."""
    from fpcn_dist.data.decoding.backends import open_backend
    from fpcn_dist.data.loader import EvalLoader

    backend = open_backend("auto").name
    config = DataConfig(resize=48, crop=48, eval_batch_size=1, threads=1)
    rows, columns = np.mgrid[0:72, 0:96]
    pixels = np.stack([columns * 2, rows * 3, 255 - columns - rows], axis=2).astype(np.uint8)
    with tempfile.TemporaryDirectory(prefix="fpcn-doctor-") as folder:
        file = Path(folder, "gradient.jpg")
        Image.fromarray(pixels).save(file, quality=95)
        label = np.zeros(1, dtype=np.int64)
        (batch,) = EvalLoader([Blob(str(file))], label, label, config, rank=0, world_size=1, device=device)
        with Image.open(file) as image:
            expected_HWC = np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR), dtype=np.float32)
    mean, std = (np.array(values, np.float32) for values in (config.preprocessing.mean, config.preprocessing.std))
    got_HWC = batch.images[0].cpu().permute(1, 2, 0).numpy() * std + mean
    if got_HWC.shape != expected_HWC.shape:
        difference = f"has the shape {got_HWC.shape}, not {expected_HWC.shape}"
    elif (mean := float(np.abs(got_HWC * 255 - expected_HWC).mean())) < 3:
        yield ok(f"a JPEG on {device} by {backend} as Pillow has it, to {mean:.1f} grey levels")
        return
    else:
        difference = f"differs by {mean:.1f} grey levels from Pillow's"
    reinstall = "DALI and nvImageCodec" if backend == "dali" else "torchvision"
    yield problem(f"a JPEG decoded on {device} by {backend} {difference}", f"install {reinstall} of constraints.txt")


def masked_pool(device: torch.device) -> Iterator[Finding]:
    """Compare forward pass and gradient of the pooling operation with its definition in float64."""
    generator = torch.Generator().manual_seed(0)
    # Eighths, whose sums are exact in float32 too: so both find the same region.
    features = torch.randint(-16, 17, (3, 20, 7, 9), generator=generator) / 8
    weight = torch.randn(3, 20, generator=generator)

    def compute(operation: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, where: torch.device, **options):
        input_BCHW = features.to(where, dtype, copy=True).requires_grad_()
        pooled, mask, area = operation(input_BCHW, theta=0.1, **options)
        (gradient,) = torch.autograd.grad((pooled * weight.to(pooled)).sum(), input_BCHW)
        return {"pooled": pooled, "mask": mask, "area": area, "gradient": gradient}

    got = compute(fpcn_kernels.masked_pool, torch.float32, device, backend=_backend(device))
    yield _compared(got, compute(reference.masked_pool, torch.float64, torch.device("cpu")), device)


def pair_contrast(device: torch.device) -> Iterator[Finding]:
    """Compare loss and gradients of the pair operation with its definition in float64."""
    images, channels, width, classes = 5, 12, 9, 3
    generator = torch.Generator().manual_seed(0)
    weights = [(width, 2 * channels), (width,), (channels, width), (channels,), (classes, channels), (classes,)]
    shapes = [(images, channels), *weights]
    operands = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]
    labels = torch.randint(classes, (images,), generator=generator)

    def compute(operation: Callable[..., Tensor], dtype: torch.dtype, where: torch.device, **options):
        pooled, *parameters = [operand.to(where, dtype, copy=True).requires_grad_() for operand in operands]
        loss = operation(pooled, labels.to(where), fpcn_kernels.PairHead(*parameters), **options)
        gradients = torch.autograd.grad(loss, [pooled, *parameters])
        return {"loss": loss} | {f"gradient {index}": gradient for index, gradient in enumerate(gradients)}

    got = compute(fpcn_kernels.pair_contrast, torch.float32, device, backend=_backend(device))
    yield _compared(got, compute(reference.pair_contrast, torch.float64, torch.device("cpu")), device)


def _backend(device: torch.device) -> str:
    return "triton" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "torch"


def _compared(got: dict[str, Tensor], expected: dict[str, Tensor], device: torch.device) -> Finding:
    what = f"{'Triton' if _backend(device) == 'triton' else 'PyTorch'} on {device}"
    for name, value in expected.items():
        value = value.detach()
        error = float((got[name].detach().cpu() - value).abs().max() / value.abs().max())
        if not error < _TOLERANCE:  # so that NaN is found too
            found = f"{what}: {name} is wrong by {error:.2g} of its largest value"
            return problem(found, "install torch and triton of constraints.txt, and the driver that they ask for")
    return ok(f"{what} agrees with float64, gradients too")


def data(folder: Address) -> Iterator[Finding]:
    """Tell what training would find in the data; whether the classes are large enough depends on the recipe."""
    from fpcn_dist.data.decoding.backends import open_backend
    from fpcn_dist.data.index.build import build_manifest
    from fpcn_dist.data.index.shapes.recognise import recognise

    backend = open_backend("auto").name
    any_size = DataConfig(backend=backend, classes_per_batch=None, images_per_class=1, val_fraction=0, test_fraction=0)
    manifest = build_manifest(folder, any_size, seed=0)
    sizes = np.bincount(manifest.labels, minlength=len(manifest.classes))
    smallest = manifest.classes[int(sizes.argmin())]
    shape = recognise(folder, any_size.columns).name
    yield ok(
        f"{shape}: {len(manifest.images)} images of {len(sizes)} classes, the fewest ({sizes.min()}) of {smallest!r}"
    )
    if manifest.refused:
        shown = "; ".join(f"{image.path}: {image.reason}" for image in manifest.refused[:3])
        more = "; ..." if len(manifest.refused) > 3 else ""
        found = f"{len(manifest.refused)} image(s) cannot be used and would be left out ({shown}{more})"
        yield warning(found, "restore or remove them")
    for notice in manifest.notices:
        yield warning(f"{notice.subject}: {notice.text}", "")


def data_is_here(folder: Address) -> Iterator[Finding]:
    """Tell whether a node other than the first sees the data at all."""
    from fpcn_dist.data.index.shapes.tar import expand
    from fpcn_dist.data.remote.store import reach

    if isinstance(folder, RemoteFolder):
        reach(folder.url)
        yield ok(f"{folder} can be listed from here too")
    elif folder.exists() or all(Path(shard).exists() for shard in expand(str(folder))):
        yield ok(f"{folder} is here too")
    else:
        yield problem(f"there is no {folder} on this machine", "share it with all nodes, at the same place")
