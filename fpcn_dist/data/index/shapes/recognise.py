"""Which shape the data at ``--data`` have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fpcn_dist.data.index import layout
from fpcn_dist.data.index.shapes import remote
from fpcn_dist.data.index.shapes.found import Found
from fpcn_dist.recipe.data import ColumnsConfig
from fpcn_dist.runtime.address import Address, RemoteFolder


class Shape(NamedTuple):
    """A shape that was recognised.

    Attributes:
        name: in words.
        find: finds the images.
    """

    name: str
    find: Callable[[], Found]


def recognise(data: Address, columns: ColumnsConfig) -> Shape:
    """The shape of a data set, told by names alone.

    Args:
        data: a folder or a file.
        columns: the recipe's ``data.columns``.

    Raises:
        UserError: by ``find``: there is nothing there, or nothing that can be used.
    """
    if isinstance(data, RemoteFolder):
        return Shape("a remote folder of images", lambda: remote.find(data))
    return Shape("a folder of images", lambda: _folder(data))


def _folder(data: Path) -> Found:
    candidates, notices = layout.find(data)
    return Found(candidates, notices=notices)
