"""JPEGs that were cut short, and are shown nevertheless: ``data.on_bad_image: salvage``."""

from __future__ import annotations

from collections.abc import Sequence

from fpcn_dist.data.blob import Blob
from fpcn_dist.data.decoding.formats.header import DAMAGED
from fpcn_dist.data.index.check.checking import Check, check_blobs

SALVAGED = "is cut short: the rows that are missing, at most 5 %, are shown in the mean colour of the others"
_DECODER = "fpcn_dist.data.decoding.photograph:Salvager"


def salvage(blobs: Sequence[Blob], checks: Sequence[Check], max_pixels: int) -> tuple[list[Check], list[int]]:
    """Take what was refused because it was cut short, where nearly all of it is there.

    Args:
        blobs: encoded images.
        checks: what was found out about each.
        max_pixels: as in :func:`fpcn_dist.data.index.check.images.check_images`.

    Returns:
        The checks, and the indices of those that are usable now.
    """
    judged = list(checks)
    damaged = [index for index, check in enumerate(checks) if check.reason == DAMAGED]
    for at, check in check_blobs([blobs[index] for index in damaged], _DECODER, max_pixels):
        judged[damaged[at]] = check
    return judged, [index for index in damaged if judged[index].ok]
