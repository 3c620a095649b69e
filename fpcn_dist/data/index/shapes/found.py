"""What a data set holds, whatever its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from fpcn_dist.data.blob import Stored
from fpcn_dist.data.index.images import Refused
from fpcn_dist.data.index.layout import Candidate
from fpcn_dist.data.index.notices import Notice


class Found(NamedTuple):
    """The images of a data set, before anything is read of them.

    Attributes:
        candidates: the images.
        refused: those that are refused already.
        notices: what a user should know about the rest.
        stored: what a remote folder lists of its objects, by their path.
    """

    candidates: list[Candidate]
    refused: Sequence[Refused] = ()
    notices: Sequence[Notice] = ()
    stored: Mapping[str, Stored] = MappingProxyType({})
