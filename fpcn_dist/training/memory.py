"""What a step will take of a device's memory, before the first one is made."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, Batch
from fpcn_dist.models.modes import evaluating
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.limits import GIB
from fpcn_dist.runtime.memory import free_and_total
from fpcn_dist.tasks import Task

_SHOWN = 2
"""Images that are encoded to see what one keeps; one alone may be a special case."""
_COPIES = 4
"""Of each parameter: itself, its gradient, and up to two moments of the optimizer."""
_SHARE = 0.5
"""Of the free memory, which a step may take unsaid: an estimate leaves out what libraries use by themselves."""


def saved_bytes(task: Task, image_size: int) -> int:
    """Bytes that ``task`` keeps for the backward pass of one [3, ``image_size``, ``image_size``] image.

    All parameters count as learning, whatever is frozen at first.
    """
    parameters = list(task.parameters())
    device, learning = parameters[0].device, [parameter.requires_grad for parameter in parameters]
    images = torch.zeros(_SHOWN, 3, image_size, image_size, device=device)
    zeros = torch.zeros(_SHOWN, dtype=torch.int64, device=device)
    batch = Batch(images, zeros, zeros, zeros, zeros[:, None].double().expand(-1, 5))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*parameters, *task.buffers(), images)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
        noting = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with evaluating(task), torch.enable_grad(), noting:
            # Its graph must live until all is counted, as storages are told apart by where they lie.
            encoded = task(batch, 0, encode_only=True)
        del encoded
    finally:
        for parameter, was in zip(parameters, learning, strict=True):
            parameter.requires_grad_(was)
    return sum(kept.values()) // _SHOWN


def step_bytes(task: Task, recipe: Recipe, images: int) -> int:
    """Bytes that a step takes of which a rank's share are ``images``: what is kept for the backward pass of the
    largest part, the batches that are decoded, and the weights with all that belongs to them."""
    part, side = -(-images // recipe.train.micro_batches), recipe.data.crop
    batches = (1 + BATCHES_IN_FLIGHT) * images * 3 * side * side * torch.float32.itemsize
    weights = _COPIES * sum(parameter.numel() * parameter.element_size() for parameter in task.parameters())
    return part * saved_bytes(task, side) + batches + weights


def free_bytes(device: torch.device) -> int:
    """Bytes that this rank may still take of its device, or of its share of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_and_total()[0] // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def describe_memory(task: Task, recipe: Recipe, classes: int, world_size: int, free: int) -> str | None:
    """A line for the user where batches that show all classes need much of the free memory, else ``None``."""
    per_class, asked = recipe.data.images_per_class, recipe.data.classes_per_batch
    if per_class is None or (asked is not None and asked < classes):
        return None
    needed = step_bytes(task, recipe, classes * per_class // world_size)
    if needed <= _SHARE * free:
        return None
    fewer = max(2, int(classes * _SHARE * free / needed))
    return (
        f"warning: a batch of all {classes:,} classes holds {classes * per_class:,} images, and a step takes about "
        f"{needed / GIB:.1f} GiB on each rank, where {free / GIB:.1f} GiB are free; "
        f"set data.classes_per_batch {fewer}, or raise train.micro_batches"
    )
