"""What a data set holds, whatever its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fpcn_dist.data.index.images import Refused
from fpcn_dist.data.index.layout import Candidate


class Found(NamedTuple):
    """The images of a data set, before anything is read of them, and those that are refused already."""

    candidates: list[Candidate]
    refused: Sequence[Refused] = ()
