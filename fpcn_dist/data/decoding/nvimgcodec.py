"""The decoder of DALI's pipeline on the CPU, one image at a time. Imports neither torch nor DALI itself."""
# nvImageCodec makes its types at import, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import os

# What nvImageCodec would print for a bad file, we report with its path.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

from fpcn_dist.data.decoding.fault import find_fault


class Decoder:
    """One instance per thread."""

    def __init__(self) -> None:
        cpu = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
        backends = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
        self._decoder = nvimgcodec.Decoder(device_id=cpu, max_num_cpu_threads=1, backends=backends)

    def fault(self, data: bytes, max_pixels: int) -> str | None:
        """Why an image file cannot be used, or ``None`` where it can."""
        return find_fault(data, max_pixels, self)

    def size(self, data: bytes) -> tuple[int, int] | None:
        """Width and height that the header of an image file announces; ``None`` where it is no image."""
        try:
            stream = nvimgcodec.CodeStream(data)
            return stream.width, stream.height
        except RuntimeError:
            return None

    def decodes(self, data: bytes) -> bool:
        """Whether the pixels of an image file are all there."""
        return self._decoder.decode([nvimgcodec.CodeStream(data)])[0] is not None
