"""The decoding backends behind one interface: DALI where it is installed, torchvision everywhere else.

Both give the same batches: on the CPU bit for bit, on a GPU within one grey level. A backend is imported when it is
opened.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fpcn_dist.data.batch import BATCHES_IN_FLIGHT, BatchRequest
from fpcn_dist.recipe.schema import DataConfig, DecodingBackend
from fpcn_dist.runtime.errors import UserError


class Decoding(Protocol):
    """Requests under way, decoded ahead of whoever takes them, a bounded number of batches at a time."""

    def next(self) -> Tensor:
        """The images of the next request, [B, 3, crop, crop] float32, normalised, owned by the caller.

        Raises:
            StopIteration: there are no more requests.
            RuntimeError: a file of the batch cannot be read or decoded; the decoding is then of no further use.
        """
        ...

    def close(self) -> None:
        """Stop its threads and free its buffers."""
        ...


class Backend(NamedTuple):
    """An opened backend.

    Attributes:
        name: ``dali`` or ``torchvision``.
        version: of what decodes; with another version, files may be refused that were not before.
        decoding: begins to decode an iterator of requests with a config, a device, the size of the largest batch and a
            number of CPU threads.
        decoder: import path of what decodes one image at a time, as ``decoding`` does on the CPU: a
            :class:`fpcn_dist.data.index.checker.Decoder`, in a module that imports no torch.
        decodes_at_once: requests whose decoded images it may hold at the same time.
    """

    name: DecodingBackend
    version: str
    decoding: Callable[[Iterator[BatchRequest], DataConfig, torch.device, int, int], Decoding]
    decoder: str
    decodes_at_once: int


def has_dali() -> bool:
    """Whether DALI and the decoder that it uses are installed."""
    try:
        return all(importlib.util.find_spec(name) for name in ("nvidia.dali", "nvidia.nvimgcodec"))
    except ModuleNotFoundError:  # no package of NVIDIA's at all
        return False


def open_backend(name: DecodingBackend) -> Backend:
    """The backend that a recipe's ``data.backend`` names; ``auto`` is DALI where it is installed, else torchvision.

    Raises:
        UserError: DALI is asked for, and is not installed.
    """
    if name == "torchvision" or (name == "auto" and not has_dali()):
        from fpcn_dist.data.decoding import photograph, torchvision

        decoder = f"{photograph.__name__}:Decoder"
        return Backend("torchvision", torchvision.VERSION, torchvision.Decoding, decoder, BATCHES_IN_FLIGHT)
    if not has_dali():
        hint = "pip install 'fpcn-dist[cuda13]' (or cuda12), or set data.backend to auto or torchvision"
        raise UserError("data.backend", name, "DALI is not installed here", hint)
    from fpcn_dist.data.decoding import dali, nvimgcodec

    return Backend("dali", dali.VERSION, dali.Decoding, f"{nvimgcodec.__name__}:Decoder", 1)
